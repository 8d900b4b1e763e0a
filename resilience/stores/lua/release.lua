-- Free the key of an operation that failed. KEYS[1]: the record. ARGV: token (16 bytes). Returns 1, or 0.
local raw = redis.call('GET', KEYS[1])
if not raw or #raw < 43 or raw:sub(1, 2) ~= 'IP' or raw:sub(27, 42) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
