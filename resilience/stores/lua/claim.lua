-- Ask to run an operation. See decisions/idempotency.py, decide_claim; the record is described in stores/record.py.
-- KEYS[1]: the record. ARGV: token (16 bytes), fingerprint, "reexecute" | "refuse", the record of a new claim, ttl in ms
-- Returns: {"claimed", epoch} | {"in_progress", ms} | {"completed", record} | {"mismatched"} | {"abandoned"} | {"expired"}
local raw = redis.call('GET', KEYS[1])
if not raw then
  redis.call('SET', KEYS[1], ARGV[4], 'PX', ARGV[5])
  return { 'claimed', 1 }
end
if raw:sub(1, 1) ~= 'I' or #raw < 43 or #raw < 43 + raw:byte(43) then return redis.error_reply('FOREIGN ' .. KEYS[1]) end
local function take(by)
  redis.call('SET', KEYS[1], ARGV[4]:sub(1, 2) .. struct.pack('>I8', by) .. ARGV[4]:sub(11), 'PX', ARGV[5])
  return { 'claimed', by }
end
local epoch, span, life = struct.unpack('>I8I8I8', raw, 3)
if raw:sub(2, 2) == 'R' then return take(epoch + 1) end
local print = raw:sub(44, 43 + raw:byte(43))
if print ~= ARGV[2] and print:match('^[^:]*') == ARGV[2]:match('^[^:]*') then return { 'mismatched' } end
-- Only the server's clock judges: a record's age is what has gone of its time to live.
local function left() return span - (life - redis.call('PTTL', KEYS[1])) end
if raw:sub(2, 2) == 'D' then
  if span < life and left() <= 0 then return { 'expired' } end
  return { 'completed', raw }
end
if raw:sub(27, 42) == ARGV[1] then return take(epoch) end
local lease = left()
if lease > 0 then return { 'in_progress', lease } end
if ARGV[3] == 'refuse' then return { 'abandoned' } end
return take(epoch + 1)
