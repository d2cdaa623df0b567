-- Give a job back to the front of its queue: nobody's fault, so no retry is spent.
-- Fenced by the lease. A job's hash gets one field of our own: `released`, how often that was.
--
-- KEYS  1 job hash  2 StartedJobRegistry  3 execution hash  4 the job's executions
--       5 the worker's set of executions  6 queue list
-- ARGV  1 job id  2 execution id
-- Returns 1 given back, 0 lease lost, or no job any more: somebody's key of another type is there.
-- pcall: so it may be in a place of RQ's, too; the job goes back all the same.
redis.call('LLEN', KEYS[6]) -- what is no list is told before anything is written
local composite = ARGV[1] .. ':' .. ARGV[2]
if redis.call('ZREM', KEYS[2], composite) == 0 then
  return 0
end
redis.call('DEL', KEYS[3])
redis.pcall('ZREM', KEYS[4], ARGV[2])
redis.pcall('SREM', KEYS[5], composite)
local known = redis.pcall('HGET', KEYS[1], 'released')
if type(known) == 'table' then
  return 0
end
local released = tonumber(known or '') or 0
released = released > 0 and released < 2 ^ 31 and math.floor(released) + 1 or 1
redis.call('HSET', KEYS[1], 'status', 'queued', 'worker_name', '', 'released', released)
redis.call('LPUSH', KEYS[6], ARGV[1])
return 1
