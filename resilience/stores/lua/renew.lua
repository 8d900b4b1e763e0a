-- Extend the owner's lease. KEYS[1]: the record. ARGV: token (16 bytes), lease in ms, ttl in ms. Returns 1, or 0.
local raw = redis.call('GET', KEYS[1])
if not raw or #raw < 43 or raw:sub(1, 2) ~= 'IP' or raw:sub(27, 42) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], raw:sub(1, 10) .. struct.pack('>I8I8', ARGV[2], ARGV[3]) .. raw:sub(27), 'PX', ARGV[3])
return 1
