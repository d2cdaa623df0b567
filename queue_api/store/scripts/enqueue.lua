-- Save a job and push it on its queue, unless a job of that id is alive. The owner of the id
-- may thus enqueue again after any crash without making work twice.
--
-- KEYS  1 job hash  2 queue list  3 set of all queues  4 FailedJobRegistry of the queue
-- ARGV  1 job id  2 'RPUSH' or 'LPUSH'  3 most jobs the queue may hold (0: no limit)
--       4… field, value, … of the job hash
-- Returns 1 enqueued, 0 already alive, -1 the queue is full.
local status = redis.call('HGET', KEYS[1], 'status')
if status == 'queued' or status == 'started' or status == 'scheduled' or status == 'deferred' then
  return 0
end
local limit = tonumber(ARGV[3])
if limit > 0 and redis.call('LLEN', KEYS[2]) >= limit then
  return -1
end
-- First what a full Redis refuses: where a script has begun to write, it lets it go on.
redis.call('SADD', KEYS[3], KEYS[2])
redis.call('DEL', KEYS[1])
redis.call('ZREM', KEYS[4], ARGV[1])
redis.call('HSET', KEYS[1], unpack(ARGV, 4))
redis.call(ARGV[2], KEYS[2], ARGV[1])
return 1
