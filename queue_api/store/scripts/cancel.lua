-- Cancel jobs that wait on their queue, as RQ's Job.cancel does: status, queue, registry.
-- The caller goes on behind the last one answered for until it has an answer for each.
--
-- KEYS  1 queue list  2 CanceledJobRegistry of the queue  3… (job hash, the job's dependents) per job
-- ARGV  1 queue name  2 time to live of the job hashes (seconds); RQ keeps them for ever
--       3 entries of the queue to look at: bounds how long the server is held up
--       4 RQ's key prefix  5… job ids
-- Returns for each job that it came to, at least one: 1 cancelled; 0 ended or never was;
-- 2 alive but left alone: RQ's own handler has to do it, because the job runs, waits elsewhere,
-- has dependents, or holds a slot of a rate limit.
-- A queue or registry that is somebody's key of another type is passed over.
local function is_fit(key, kind)
  local found = redis.call('TYPE', key).ok
  return found == kind or found == 'none'
end

local has_queue, has_registry = is_fit(KEYS[1], 'list'), is_fit(KEYS[2], 'zset')
local length, budget = has_queue and redis.call('LLEN', KEYS[1]) or 0, tonumber(ARGV[3])
local now = redis.call('TIME')[1]
local ended = {finished = true, failed = true, stopped = true, canceled = true}
local reply = {}
-- RQ takes nothing off its registry, not even jobs whose hashes are gone. More are looked at than
-- come, so it doesn't grow for ever; drawn, since the oldest may be somebody's who keeps them.
local seen = has_registry and redis.call('ZRANDMEMBER', KEYS[2], 4 * (#ARGV - 4)) or {}
for _, id in ipairs(seen) do
  if redis.call('EXISTS', ARGV[4] .. ':job:' .. id) == 0 then
    redis.call('ZREM', KEYS[2], id)
  end
end
for i = 5, #ARGV do
  local job, dependents = KEYS[2 * i - 7], KEYS[2 * i - 6]
  -- pcall: somebody's key of another type under a job's name must not keep the others alive
  local known = redis.pcall('HMGET', job, 'status', 'origin', 'rate_limit_key')
  if known.err and not string.find(known.err, 'WRONGTYPE', 1, true) then
    return known
  elseif not known[1] or ended[known[1]] then
    reply[#reply + 1] = 0
  elseif known[1] ~= 'queued' or known[2] ~= ARGV[1] or (known[3] or '') ~= ''
    or redis.call('EXISTS', dependents) == 1 then
    reply[#reply + 1] = 2
  else
    -- LREM looks through the queue from its head to the job, at worst all of it
    budget = budget - length
    if budget < 0 and #reply > 0 then
      break
    end
    if has_queue then
      redis.call('LREM', KEYS[1], 1, ARGV[i])
    end
    redis.call('HSET', job, 'status', 'canceled')
    redis.call('EXPIRE', job, ARGV[2])
    if has_registry then
      redis.call('ZADD', KEYS[2], now, ARGV[i])
    end
    reply[#reply + 1] = 1
  end
end
return reply
