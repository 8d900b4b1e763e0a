-- Free the key of an operation that failed. After a takeover the epoch stays, for as long as the record was to live.
-- KEYS[1]: the record. ARGV: token (16 bytes). Returns 1, or 0.
local raw = redis.call('GET', KEYS[1])
if not raw or #raw < 43 or raw:sub(1, 2) ~= 'IP' or raw:sub(27, 42) ~= ARGV[1] then return 0 end
local epoch, _, life = struct.unpack('>I8I8I8', raw, 3)
if epoch == 1 then return redis.call('DEL', KEYS[1]) end
-- The state lasts for all of its life, has no fingerprint, and whose token it has means nothing.
local times = raw:sub(19, 26)
redis.call('SET', KEYS[1], 'IR' .. raw:sub(3, 10) .. times .. times .. raw:sub(27, 42) .. '\0', 'PX', life)
return 1
