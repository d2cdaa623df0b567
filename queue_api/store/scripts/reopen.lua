-- Clear done bits, so that requests whose results were lost (the output file was removed after
-- the stream had been trimmed) can be computed again. The counters by finish reason keep the
-- lost ones: what they were isn't known any more.
--
-- KEYS  1 run hash  2 result stream  3 done bitmap
-- ARGV  1 time to live of the run (seconds)  2… indexes
-- Returns how many were set.
local cleared = 0
for i = 2, #ARGV do
  cleared = cleared + redis.call('SETBIT', KEYS[3], ARGV[i], 0)
end
if cleared > 0 then
  redis.call('HINCRBY', KEYS[1], 'done', -cleared)
end
for k = 1, 3 do
  redis.call('EXPIRE', KEYS[k], ARGV[1])
end
return cleared
