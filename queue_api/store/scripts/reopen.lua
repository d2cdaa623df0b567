-- Clear done bits, so that requests whose results were lost (the output file was removed after
-- the stream had been trimmed) can be computed again. The counters by finish reason keep the
-- lost ones: what they were isn't known any more.
--
-- KEYS  1 run hash  2 done bitmap
-- ARGV  indexes
-- Returns how many were set.
local cleared = 0
for i = 1, #ARGV do
  cleared = cleared + redis.call('SETBIT', KEYS[2], ARGV[i], 0)
end
if cleared > 0 then
  redis.call('HINCRBY', KEYS[1], 'done', -cleared)
end
return cleared
