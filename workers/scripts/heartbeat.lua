-- Renew the leases of all jobs that a worker runs, and tell which it no longer holds.
--
-- KEYS  1 worker hash  2 the worker's set of executions
-- ARGV  1 time for people (ISO)  2 lease (seconds)  3 time to live of the worker's hash (seconds)
--       4 RQ's key prefix  5 the worker's state
--       6… (queue name, job id, execution id) per job
-- Returns {1 if RQ still knew the worker, else 0; (execution id, job status or '') per lost job}.
-- A lost job was cancelled, deleted, or given to another worker after its lease ran out.
-- pcall: somebody's key of another type under a job's names must not cost the others their leases.
local iso, lease, worker_ttl, prefix = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4]
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1e6
local stamp = string.format('%.6f', now)
local reply = {redis.call('EXISTS', KEYS[1])}
-- First what takes no memory: where a script has begun to write, a full Redis lets it go on, and
-- leases have to be renewed then as well.
redis.call('EXPIRE', KEYS[1], worker_ttl)
redis.call('HSET', KEYS[1], 'last_heartbeat', iso, 'state', ARGV[5])
redis.call('EXPIRE', KEYS[1], worker_ttl)
redis.call('EXPIRE', KEYS[2], worker_ttl)
for i = 6, #ARGV, 3 do
  local registry, id, execution = prefix .. ':wip:' .. ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local composite = id .. ':' .. execution
  local job = prefix .. ':job:' .. id
  local executions = prefix .. ':executions:' .. id
  local status = redis.pcall('HGET', job, 'status')
  status = type(status) == 'string' and status
  if status and type(redis.pcall('ZSCORE', registry, composite)) == 'string' then
    redis.call('ZADD', registry, 'XX', now + lease, composite)
    redis.call('HSET', prefix .. ':execution:' .. composite, 'last_heartbeat', stamp)
    redis.call('EXPIRE', prefix .. ':execution:' .. composite, lease + 60)
    if type(redis.pcall('ZADD', executions, 'XX', now + lease + 60, execution)) == 'number' then
      redis.call('EXPIRE', executions, lease + 60)
    end
    redis.call('HSET', job, 'last_heartbeat', iso)
  else
    redis.pcall('ZREM', registry, composite)
    redis.call('DEL', prefix .. ':execution:' .. composite)
    redis.pcall('ZREM', executions, execution)
    redis.call('SREM', KEYS[2], composite)
    reply[#reply + 1] = execution
    reply[#reply + 1] = status or ''
  end
end
return reply
