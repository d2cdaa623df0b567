-- Save a job and push it on its queue, unless a job of that id is alive. The owner of the id
-- may thus enqueue again after any crash without making work twice.
-- A job that waits for a run of that name which is gone has other requests: it makes way.
--
-- KEYS  1 job hash  2 queue list  3 set of all queues  4 FailedJobRegistry of the queue
-- ARGV  1 job id  2 'RPUSH' or 'LPUSH'  3 most jobs the queue may hold (0: no limit)
--       4 fingerprint of the run, or nothing  5… field, value, … of the job hash
-- Returns 1 enqueued, 0 already alive, -1 the queue is full, -2 the job's hash is somebody's key of
-- another type, which stays as it is.
-- pcall: that is this job's misfortune alone
local known = redis.pcall('HMGET', KEYS[1], 'status', 'run_fingerprint', 'origin')
if known.err then
  return string.find(known.err, 'WRONGTYPE', 1, true) and -2 or known
end
local status, fingerprint, origin = known[1], known[2], known[3]
if status == 'queued' and fingerprint and fingerprint ~= ARGV[4] and origin then
  -- KEYS[3] is 'rq:queues', a queue's list 'rq:queue:<name>'
  local list = string.sub(KEYS[3], 1, -2) .. ':' .. origin
  -- not there: somebody is taking it just now, or it is elsewhere, which isn't known here
  if redis.pcall('LREM', list, 1, ARGV[1]) == 1 then
    status = false
  end
end
if status == 'queued' or status == 'started' or status == 'scheduled' or status == 'deferred' then
  return 0
end
-- asked even without a limit: what is no list is told before anything is written
local limit, length = tonumber(ARGV[3]), redis.call('LLEN', KEYS[2])
if limit > 0 and length >= limit then
  return -1
end
-- First what a full Redis refuses: where a script has begun to write, it lets it go on.
redis.call('SADD', KEYS[3], KEYS[2])
redis.call('DEL', KEYS[1])
redis.pcall('ZREM', KEYS[4], ARGV[1])
redis.call('HSET', KEYS[1], unpack(ARGV, 5))
redis.call(ARGV[2], KEYS[2], ARGV[1])
return 1
