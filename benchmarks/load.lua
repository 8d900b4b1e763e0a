-- wrk's side of benchmarks/load.py: a new idempotency key for each request if a prefix is given, and figures as JSON.
local threads = 0

function setup(thread)
  thread:set("place", threads)
  threads = threads + 1
end

function init(arguments)
  if arguments[1] then
    local prefix, sent = arguments[1] .. "-" .. place .. "-", 0
    wrk.method, wrk.body = "POST", arguments[2]
    wrk.headers["Content-Type"] = "application/json"
    request = function()
      sent = sent + 1
      wrk.headers["Idempotency-Key"] = prefix .. sent
      return wrk.format()
    end
  end
end

function done(summary)
  local errors = summary.errors
  io.write(string.format('\n{"requests": %d, "microseconds": %d, "refused": %d, "broken": %d}\n', summary.requests,
    summary.duration, errors.status, errors.connect + errors.read + errors.write + errors.timeout))
end
