-- Save a job and push it on its queue, unless a job of that id is alive. The owner of the id
-- may thus enqueue again after any crash without making work twice.
--
-- KEYS  1 job hash  2 queue list  3 set of all queues  4 FailedJobRegistry of the queue
-- ARGV  1 job id  2 'RPUSH' or 'LPUSH'  3 most jobs the queue may hold (0: no limit)
--       4… field, value, … of the job hash
-- Returns 1 enqueued, 0 already alive, -1 the queue is full, -2 the job's hash is somebody's key of
-- another type, which stays as it is.
-- pcall: that is this job's misfortune alone
local status = redis.pcall('HGET', KEYS[1], 'status')
if type(status) == 'table' then
  return string.find(status.err, 'WRONGTYPE', 1, true) and -2 or status
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
redis.call('HSET', KEYS[1], unpack(ARGV, 4))
redis.call(ARGV[2], KEYS[2], ARGV[1])
return 1
