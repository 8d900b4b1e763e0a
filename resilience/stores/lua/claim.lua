-- Ask to run an operation. See decisions/idempotency.py, decide_claim; the record is described in stores/record.py.
-- KEYS[1]: the record. ARGV: token (16 bytes), fingerprint, "reexecute" | "refuse", the record of a new claim, ttl in ms
-- Returns: {"claimed", epoch} | {"in_progress", ms} | {"completed", record} | {"mismatched"} | {"abandoned"}
local raw = redis.call('GET', KEYS[1])
if not raw then
  redis.call('SET', KEYS[1], ARGV[4], 'PX', ARGV[5])
  return { 'claimed', 1 }
end
if raw:sub(1, 1) ~= 'I' or #raw < 40 or #raw < 39 + raw:byte(39) then return redis.error_reply('FOREIGN ' .. KEYS[1]) end
local print = raw:sub(40, 39 + raw:byte(39))
if print ~= ARGV[2] and print:match('^[^:]*') == ARGV[2]:match('^[^:]*') then return { 'mismatched' } end
if raw:sub(2, 2) == 'D' then return { 'completed', raw } end
local epoch, lease, ttl = struct.unpack('>I8I4I8', raw, 3)
local function take(by)
  redis.call('SET', KEYS[1], ARGV[4]:sub(1, 2) .. struct.pack('>I8', by) .. ARGV[4]:sub(11), 'PX', ARGV[5])
  return { 'claimed', by }
end
if raw:sub(23, 38) == ARGV[1] then return take(epoch) end
-- Only the server's clock judges: a record's age is what has gone of its time to live.
local left = lease - (ttl - redis.call('PTTL', KEYS[1]))
if left > 0 then return { 'in_progress', left } end
if ARGV[3] == 'refuse' then return { 'abandoned' } end
return take(epoch + 1)
