-- End a job as RQ does when it succeeded: status, result, registries, counters, times to live.
-- Fenced by the lease: whoever lost it changes nothing.
--
-- KEYS  1 job hash  2 StartedJobRegistry  3 execution hash  4 the job's executions
--       5 worker hash  6 the worker's set of executions  7 the job's results
--       8 FinishedJobRegistry  9 the job's dependents
--       of a job with a run also  10 run hash  11 done bitmap
-- ARGV  1 job id  2 execution id  3 time for people (ISO)  4 worker name
--       5 return value (base64 of JSON)  6 start (epoch seconds)  7 default result_ttl (seconds)
--       8… (first index, how many, at most 32) of the run's requests that have their results
-- Returns 1 finished, 0 lease lost, 2 left alone: RQ's own handler has to do it, because jobs
-- depend on each other, it repeats, or it holds a slot of a rate limit or a place in a group.
-- 3 left alone: results that were written are gone, lost in a crash of Redis; do them again.
-- pcall, below: where somebody's key of another type stands in a place of RQ's, the job ends all the
-- same, and that key stays as it is.
local id, execution, iso = ARGV[1], ARGV[2], ARGV[3]
local composite = id .. ':' .. execution
if not redis.call('ZSCORE', KEYS[2], composite) or redis.call('EXISTS', KEYS[1]) == 0 then
  return 0
end
if #ARGV > 7 and redis.call('EXISTS', KEYS[10]) == 1 then
  local reads = {}
  for i = 8, #ARGV, 2 do
    local n = #reads
    reads[n + 1], reads[n + 2], reads[n + 3] = 'GET', 'u' .. ARGV[i + 1], ARGV[i]
  end
  -- pcall: somebody's key of another type in the bitmap's place would stay so for ever
  for n, bits in ipairs(redis.pcall('BITFIELD_RO', KEYS[11], unpack(reads))) do
    if bits ~= 2 ^ ARGV[6 + 2 * n + 1] - 1 then
      return 3
    end
  end
end
local known = redis.call('HMGET', KEYS[1], 'result_ttl', 'repeats_left', 'rate_limit_key',
  'dependency_ids', 'group_id')
local ttl = tonumber(known[1] or '')
if not ttl or ttl ~= math.floor(ttl) or math.abs(ttl) > 2 ^ 31 then
  ttl = tonumber(ARGV[7])
end
if redis.call('EXISTS', KEYS[9]) == 1 or (tonumber(known[2] or '') or 0) > 0
  or (known[3] or '') ~= '' or (known[4] or '') ~= '' or (ttl == 0 and (known[5] or '') ~= '') then
  return 2
end
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1e6
redis.call('ZREM', KEYS[2], composite)
redis.call('DEL', KEYS[3])
redis.pcall('ZREM', KEYS[4], execution)
redis.pcall('SREM', KEYS[6], composite)
redis.pcall('HINCRBY', KEYS[5], 'successful_job_count', 1)
redis.pcall('HINCRBYFLOAT', KEYS[5], 'total_working_time', string.format('%.6f', math.max(0, now - ARGV[6])))
if ttl == 0 then
  redis.call('DEL', KEYS[1])
  if redis.call('TYPE', KEYS[7]).ok == 'stream' then
    redis.call('DEL', KEYS[7])
  end
  return 1
end
redis.call('HSET', KEYS[1], 'status', 'finished', 'ended_at', iso, 'last_heartbeat', iso)
local added = redis.pcall('XADD', KEYS[7], 'MAXLEN', '~', 10, '*', 'type', 1, 'worker_name', ARGV[4],
  'return_value', ARGV[5], 'execution_id', execution, 'execution_started_at', ARGV[6],
  'execution_ended_at', string.format('%.6f', now))
if ttl > 0 then
  redis.call('EXPIRE', KEYS[1], ttl)
  redis.pcall('ZADD', KEYS[8], math.floor(now) + ttl, id)
else
  redis.pcall('ZADD', KEYS[8], '+inf', id)
end
if type(added) == 'string' and ttl > 0 then
  redis.call('EXPIRE', KEYS[7], ttl)
elseif type(added) == 'string' then
  redis.call('PERSIST', KEYS[7])
end
return 1
