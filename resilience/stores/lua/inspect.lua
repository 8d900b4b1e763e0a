-- Show a record to an operator. KEYS[1]: the record. Returns {record, what is left of its life in ms}, or nothing.
local raw = redis.call('GET', KEYS[1])
if not raw then return false end
return { raw, redis.call('PTTL', KEYS[1]) }
