-- Free a key for good, unless a live owner has it. KEYS[1]: the record. Returns 1, or 0.
local raw = redis.call('GET', KEYS[1])
if not raw then return 0 end
if raw:sub(1, 1) ~= 'I' or #raw < 43 then return redis.error_reply('FOREIGN ' .. KEYS[1]) end
local span, life = struct.unpack('>I8I8', raw, 11)
if raw:sub(2, 2) == 'P' and span - (life - redis.call('PTTL', KEYS[1])) > 0 then return 0 end
return redis.call('DEL', KEYS[1])
