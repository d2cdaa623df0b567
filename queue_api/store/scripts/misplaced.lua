-- Which jobs say that they wait or run, but aren't where such a job would be: their queue's list or
-- RQ's registry was deleted, so nobody will ever take them up.
-- The caller goes on behind the last one answered for until it has an answer for each.
--
-- KEYS  1 queue list  2 RQ's list of what its workers are just taking off that
--       3 strays that wait for our workers  4 StartedJobRegistry  5 ScheduledJobRegistry
--       6… (job hash, the job's executions) per job
-- ARGV  1 queue name  2 1: delete the hashes of those found, so that they may be enqueued anew
--       3 entries of the queue and registries to look at: bounds how long the server is held up
--       4… job ids
-- Returns for each job that it came to, at least one: 1 misplaced, else 0.
-- pcall, here and below: where somebody's key of another type stands, nothing can be told; an error
-- in place of a reply is true
local function size(command, key)
  local found = redis.pcall(command, key)
  return type(found) == 'number' and found or 0
end
local lengths = {
  queued = size('LLEN', KEYS[1]) + size('LLEN', KEYS[2]) + size('LLEN', KEYS[3]),
  started = size('ZCARD', KEYS[4]),
  scheduled = 1,
}
local budget = tonumber(ARGV[3])

local function has_lease(id, executions)
  for _, execution in ipairs(redis.pcall('ZRANGE', executions, 0, -1)) do
    if redis.pcall('ZSCORE', KEYS[4], id .. ':' .. execution) then
      return true
    end
  end
  -- of a worker that died long ago: the entry waits for somebody to reclaim it
  local cursor = '0'
  repeat
    local page = redis.pcall('ZSCAN', KEYS[4], cursor, 'MATCH', id .. ':*', 'COUNT', 1000)
    cursor = page[1]
    if page.err or #page[2] > 0 then
      return true
    end
  until cursor == '0'
  return false
end

local function is_there(status, id, executions)
  if status == 'queued' then
    return redis.pcall('LPOS', KEYS[1], id) or redis.pcall('LPOS', KEYS[2], id)
      or redis.pcall('LPOS', KEYS[3], id)
  elseif status == 'started' then
    return has_lease(id, executions)
  end
  return redis.pcall('ZSCORE', KEYS[5], id)
end

local reply = {}
for i = 4, #ARGV do
  local job, executions = KEYS[2 * i - 2], KEYS[2 * i - 1]
  local known = redis.pcall('HMGET', job, 'status', 'origin')
  local length = known[1] and known[2] == ARGV[1] and lengths[known[1]]
  local found = 0
  if length then
    budget = budget - length
    if budget < 0 and #reply > 0 then
      break
    end
    if not is_there(known[1], ARGV[i], executions) then
      found = 1
      if ARGV[2] == '1' then
        redis.call('DEL', job)
      end
    end
  end
  reply[#reply + 1] = found
end
return reply
