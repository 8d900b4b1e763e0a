-- Keep the answer, unless somebody else owns the key. A lost record is restored; a released one is anybody's to complete.
-- KEYS[1]: the record. ARGV: token (16 bytes), the finished record, its life in ms. Returns 1, or 0.
local raw = redis.call('GET', KEYS[1])
local record = ARGV[2]
if raw then
  if raw:sub(1, 1) ~= 'I' or #raw < 43 then return redis.error_reply('FOREIGN ' .. KEYS[1]) end
  if raw:sub(2, 2) ~= 'R' and raw:sub(27, 42) ~= ARGV[1] then return 0 end
  record = record:sub(1, 2) .. raw:sub(3, 10) .. record:sub(11)
end
redis.call('SET', KEYS[1], record, 'PX', ARGV[3])
return 1
