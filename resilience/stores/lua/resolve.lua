-- Answer for an owner that is gone; its fingerprint stays and its epoch rises.
-- KEYS[1]: the record. ARGV: the answer's token (16 bytes), the finished record without a fingerprint, its life in ms.
-- Returns 1, or 0.
local raw = redis.call('GET', KEYS[1])
if not raw then return 0 end
if raw:sub(1, 1) ~= 'I' or #raw < 43 or #raw < 43 + raw:byte(43) then return redis.error_reply('FOREIGN ' .. KEYS[1]) end
if raw:sub(2, 2) == 'R' then return 0 end
if raw:sub(2, 2) == 'D' then return raw:sub(27, 42) == ARGV[1] and 1 or 0 end
local epoch, span, life = struct.unpack('>I8I8I8', raw, 3)
if span - (life - redis.call('PTTL', KEYS[1])) > 0 then return 0 end
local record = ARGV[2]:sub(1, 2) .. struct.pack('>I8', epoch + 1) .. ARGV[2]:sub(11, 42)
redis.call('SET', KEYS[1], record .. raw:sub(43, 43 + raw:byte(43)) .. ARGV[2]:sub(44), 'PX', ARGV[3])
return 1
