-- Answer groups of rules. Each group takes what all of its rules are asked for, n times over, or as many times as all of
-- them allow: all or nothing. Times in microseconds, by the server's clock.
-- KEYS: the state of each rule, group by group; all on this server.
-- ARGV: for each group: n, how many rules; then for each rule: algorithm, limit, window, cost, capacity, and
--   the length of a part (sliding), of one emission (bucket), the starts of calendar windows, joined by commas (fixed), or
--   "t" and the holder's token (concurrency).
-- Returns: now; then for each group: k, how many of n were admitted, or -i where what is under the key of rule i is not
--   ours; then for each rule: left, reset, wait (-1: never).
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local floor, ceil, max, min = math.floor, math.ceil, math.max, math.min

-- What is under a key; where that is of another type, a text that no algorithm takes for its own.
local function get(key)
  local raw = redis.pcall('GET', key)
  if type(raw) ~= 'table' then return raw end
  if raw.err:find('WRONGTYPE', 1, true) then return '?' end
  error(raw.err)
end

-- How each algorithm is made: making those that a call does not use would take as long as its answer.
local makers = {}

-- "S", units counted, then pairs of (instant, units), oldest first. See decisions/sliding_window.py.
function makers.S()
  local Sliding = {}
  function Sliding.load(rule)
    local raw = get(rule.key)
    rule.used, rule.now, rule.marks = 0, now, ''
    if raw then
      if raw:sub(1, 1) ~= 'S' or #raw < 17 or (#raw - 5) % 12 ~= 0 then return false end
      rule.used = struct.unpack('>I4', raw, 2)
      rule.now = max(now, (struct.unpack('>I8', raw, #raw - 11)))
      local first = 6
      while first < #raw and struct.unpack('>I8', raw, first) + rule.window <= rule.now do
        rule.used = rule.used - struct.unpack('>I4', raw, first + 8)
        first = first + 12
      end
      rule.marks = raw:sub(first)
    end
    rule.left = max(0, rule.limit - rule.used)
    return true
  end
  function Sliding.charge(rule, units)
    local marks, instant, counted = rule.marks, rule.now, units
    if marks ~= '' then
      local last, count = struct.unpack('>I8I4', marks, #marks - 11)
      if floor(last / rule.step) == floor(instant / rule.step) then
        marks, counted = marks:sub(1, -13), count + units
      end
    end
    rule.marks = marks .. struct.pack('>I8I4', instant, counted)
    rule.used, rule.left = rule.used + units, rule.left - units
    redis.call('SET', rule.key, 'S' .. struct.pack('>I4', rule.used) .. rule.marks, 'PX', ceil(rule.window / 1000) + 1)
  end
  -- When more will be free: as it is (more = 0), or as it would be if "more" had been charged.
  function Sliding.reset(rule, more)
    local marks = rule.marks
    if marks == '' then return more > 0 and rule.window or 0 end
    local oldest = struct.unpack('>I8', marks, 1)
    local moves = more > 0 and #marks == 12 and floor(oldest / rule.step) == floor(rule.now / rule.step)
    return (moves and rule.now or oldest) + rule.window - rule.now
  end
  function Sliding.wait(rule)
    if rule.cost > rule.limit then return -1 end
    local at, freed = 1, rule.limit - rule.used + struct.unpack('>I4', rule.marks, 9)
    while freed < rule.cost do
      at = at + 12
      freed = freed + struct.unpack('>I4', rule.marks, at + 8)
    end
    return struct.unpack('>I8', rule.marks, at) + rule.window - rule.now + 1
  end
  return Sliding
end

-- "B", the instant from which the bucket is full again. See decisions/token_bucket.py.
function makers.B()
  local Bucket = {}
  function Bucket.load(rule)
    local raw = get(rule.key)
    rule.full = now
    if raw then
      if raw:sub(1, 1) ~= 'B' or #raw ~= 9 then return false end
      rule.full = max(now, (struct.unpack('>I8', raw, 2)))
    end
    rule.left = max(0, floor((rule.capacity * rule.step - (rule.full - now)) / rule.step))
    return true
  end
  function Bucket.charge(rule, units)
    rule.full = rule.full + units * rule.step
    rule.left = rule.left - units
    redis.call('SET', rule.key, 'B' .. struct.pack('>I8', rule.full), 'PX', ceil((rule.full - now) / 1000) + 1)
  end
  function Bucket.reset(rule, more)
    local missing = rule.full - now + more * rule.step
    if missing == 0 then return 0 end
    return missing - (rule.capacity - (rule.left - more) - 1) * rule.step
  end
  function Bucket.wait(rule)
    if rule.cost > rule.capacity then return -1 end
    return rule.full - now + (rule.cost - rule.capacity) * rule.step + 1
  end
  return Bucket
end

-- "F", the instant at which the window began, units counted. See decisions/fixed_window.py.
function makers.F()
  local Fixed = {}
  function Fixed.bounds(rule, instant)
    if not rule.starts then
      local start = floor(instant / rule.window) * rule.window
      return start, start + rule.window
    end
    local start = rule.starts[1]
    for _, following in ipairs(rule.starts) do
      if following > instant then return start, following end
      start = following
    end
    error('the calendar of the caller is behind the clock of the server')
  end
  function Fixed.load(rule)
    local raw = get(rule.key)
    rule.start, rule.stop = Fixed.bounds(rule, now)
    rule.used = 0
    if raw then
      if raw:sub(1, 1) ~= 'F' or #raw ~= 13 then return false end
      local start, used = struct.unpack('>I8I4', raw, 2)
      if start >= rule.start then
        rule.used = used
        rule.start, rule.stop = Fixed.bounds(rule, start)
      end
    end
    rule.left = max(0, rule.limit - rule.used)
    return true
  end
  function Fixed.charge(rule, units)
    rule.used, rule.left = rule.used + units, rule.left - units
    local value = 'F' .. struct.pack('>I8I4', rule.start, rule.used)
    redis.call('SET', rule.key, value, 'PX', ceil((rule.stop - now) / 1000) + 1)
  end
  function Fixed.reset(rule, more)
    if rule.used + more == 0 then return 0 end
    return rule.stop - now
  end
  function Fixed.wait(rule)
    if rule.cost > rule.limit then return -1 end
    return rule.stop - now + 1
  end
  return Fixed
end

-- A sorted set of the holders' tokens by the instants at which their leases are out. See decisions/concurrency.py.
function makers.C()
  local Permits = {}
  function Permits.load(rule)
    local kind = redis.call('TYPE', rule.key).ok
    if kind ~= 'zset' and kind ~= 'none' then return false end
    redis.call('ZREMRANGEBYSCORE', rule.key, '-inf', now)
    local others = redis.call('ZCARD', rule.key)
    if redis.call('ZSCORE', rule.key, rule.token) then others = others - 1 end
    rule.others, rule.left = others, max(0, rule.limit - others)
    return true
  end
  function Permits.charge(rule, units)
    rule.left = rule.left - units
    redis.call('ZADD', rule.key, now + rule.window, rule.token)
    -- Not shorter than the longest lease: another process may have another quota.
    local last = redis.call('ZRANGE', rule.key, -1, -1, 'WITHSCORES')[2]
    redis.call('PEXPIRE', rule.key, ceil((last - now) / 1000) + 1)
  end
  function Permits.first(rule)
    for _, holder in ipairs({ 0, 1 }) do
      local found = redis.call('ZRANGE', rule.key, holder, holder, 'WITHSCORES')
      if found[1] and found[1] ~= rule.token then return tonumber(found[2]) end
    end
  end
  function Permits.reset(rule)
    local first = rule.others > 0 and Permits.first(rule)
    if first then return first - now end
    return rule.cost > 0 and rule.window or 0
  end
  function Permits.wait(rule)
    local first = Permits.first(rule)
    return first and first - now + 1 or -1
  end
  return Permits
end

local algorithms, key, arg = {}, 0, 1
local answer, size = { now, 0, 0, 0, 0 }, 1 -- as long as the commonest answer, since a table that grows is copied

local function load()
  key = key + 1
  local letter = ARGV[arg]
  local algorithm = algorithms[letter]
  if not algorithm then
    algorithm = makers[letter]()
    algorithms[letter] = algorithm
  end
  local rule = {
    key = KEYS[key],
    algorithm = algorithm,
    limit = tonumber(ARGV[arg + 1]),
    window = tonumber(ARGV[arg + 2]),
    cost = tonumber(ARGV[arg + 3]),
    capacity = tonumber(ARGV[arg + 4]),
    step = tonumber(ARGV[arg + 5]),
    used = 0,
    left = 0,
    now = now,
    marks = '',
  }
  if letter == 'C' then
    rule.token = ARGV[arg + 5]
  elseif not rule.step then
    rule.starts = {}
    for start in ARGV[arg + 5]:gmatch('%d+') do rule.starts[#rule.starts + 1] = tonumber(start) end
  end
  arg = arg + 6
  if algorithm.load(rule) then return rule end
end

-- Take what a group asks for, n times over, from its counts; answer for its rules, of which two may share a count.
local function take(n, rules, counts)
  local k = n
  for _, rule in ipairs(counts) do
    if rule.cost > 0 then k = min(k, max(0, floor(rule.left / rule.cost))) end
  end
  if k > 0 then
    for _, rule in ipairs(counts) do
      if rule.cost > 0 then rule.algorithm.charge(rule, k * rule.cost) end
    end
  end
  size = size + 1
  answer[size] = k
  for _, rule in ipairs(rules) do
    local wait, more = 0, 0
    if k < n and rule.cost > rule.left then
      wait = rule.algorithm.wait(rule)
    elseif k == 0 then
      more = rule.cost -- another rule denied: this one says what it would have said
    end
    answer[size + 1], answer[size + 2], answer[size + 3] = rule.left, rule.algorithm.reset(rule, more), wait
    size = size + 3
  end
end

-- Read the rules of a group of several; a count asked twice in a group is asked once, for both.
local function load_several(count)
  local rules, counts, seen, foreign = {}, {}, {}, nil
  for i = 1, count do
    local rule = load()
    local other = rule and seen[rule.key]
    if not rule then
      foreign = foreign or i
    elseif other then
      other.cost = other.cost + rule.cost
      rules[i] = other
    else
      rules[i], seen[rule.key], counts[#counts + 1] = rule, rule, rule
    end
  end
  return rules, counts, foreign
end

while arg <= #ARGV do
  local n, count = tonumber(ARGV[arg]), tonumber(ARGV[arg + 1])
  local rules, counts, foreign
  arg = arg + 2
  if count == 1 then
    rules = { load() }
    counts, foreign = rules, not rules[1] and 1
  else
    rules, counts, foreign = load_several(count)
  end
  if foreign then
    -- Nobody knows what this group has left; the other groups are served all the same.
    answer[size + 1] = -foreign
    for at = size + 2, size + 1 + 3 * count do answer[at] = 0 end
    size = size + 1 + 3 * count
  else
    take(n, rules, counts)
  end
end
return answer
