-- Write fields of a run's hash. All keys of a run have one lifetime: whatever touches one of them
-- sets the time to live of all, so none of them outlives the others and contradicts them.
--
-- KEYS  1 run hash  2 result stream  3 done bitmap
-- ARGV  1 time to live of the run (seconds)
--       2 'make': a run of these fields, unless there is one; 'add': fields that it hasn't yet;
--         'set': whatever it has  3… (field, value) pairs
-- Returns the whole hash; nothing if there is no such run and none is to be made.
local how = ARGV[2]
if redis.call('HEXISTS', KEYS[1], 'queue') == 0 then
  if how ~= 'make' then
    return {}
  end
  -- bits and results of a run that is gone otherwise: the new one has none
  redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
end
for i = 3, #ARGV, 2 do
  redis.call(how == 'set' and 'HSET' or 'HSETNX', KEYS[1], ARGV[i], ARGV[i + 1])
end
for k = 1, 3 do
  redis.call('EXPIRE', KEYS[k], ARGV[1])
end
return redis.call('HGETALL', KEYS[1])
