-- Give our workers the jobs that ended in the hands of another worker than the one that claimed them:
-- of stock RQ, say, which can't import their function. It ran none of their requests.
-- They go on a list that our workers alone look at: on their queue the other would take them again,
-- for it fails them faster than any worker runs them.
--
-- KEYS  1 list of strays  2 FailedJobRegistry  3 FinishedJobRegistry  4… job hash per job
-- ARGV  job ids
-- Returns for each job 1 if it was rescued, else 0.
local reply = {}
for i, id in ipairs(ARGV) do
  local job = KEYS[i + 3]
  -- pcall: somebody's key of another type under a job's name must not keep the others back
  local known = redis.pcall('HMGET', job, 'status', 'worker_name', 'claimed_by', 'max_retries')
  local has_ended = known[1] == 'failed' or known[1] == 'finished'
  reply[i] = 0
  if has_ended and (known[2] or '') ~= '' and known[2] ~= known[3] then
    redis.call('HSET', job, 'status', 'queued', 'worker_name', '')
    if (tonumber(known[4] or '') or 0) > 0 then
      redis.call('HSET', job, 'retries_left', known[4])
    end
    redis.call('PERSIST', job)
    redis.call('ZREM', KEYS[2], id)
    redis.call('ZREM', KEYS[3], id)
    redis.call('RPUSH', KEYS[1], id)
    reply[i] = 1
  end
end
return reply
