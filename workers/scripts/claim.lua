-- Take jobs off the queues, in order of priority, until `want` requests are taken, and write
-- each as RQ would when a worker starts it: job started, execution, registry entry with a lease.
-- All in one call, so a worker that dies has either taken a job wholly or not at all.
--
-- A job's hash gets two fields of our own: `claims`, how often it was taken, and `claimed_by`, by
-- whom: RQ's `worker_name`, unless a worker of another kind took the job after that (rescue.lua).
--
-- A job that workers died of (`deaths`, see reclaim.lua) gets a worker for itself near the end,
-- so that the next death shows whether it is the cause. Until then nothing behind it is taken.
--
-- Jobs may have a `lane`. A worker goes on with the lane that it took a job of first, if one of it
-- stands among the first of the list: what those jobs have in common is in its cache. Jobs of other
-- lanes it takes only while it would have little to do without, best of those that it knows.
--
-- KEYS  1 worker hash  2 the worker's set of executions  3 RQ's suspension flag
--       4… (list of jobs, StartedJobRegistry) per list, best first: the strays of a queue (rescue.lua),
--       then its own
-- ARGV  1 time for people (ISO)  2 lease (seconds)  3 worker name  4 want (requests)
--       5 RQ's key prefix  6 the first 24 hex digits of the new execution ids
--       7 most jobs in one call: bounds how long the server is held up
--       8 deaths after which a job has a worker for itself  9 jobs that this worker holds
--       10 most entries of the queues to look at: what was cancelled or deleted is still there
--       11 of other lanes than its first, jobs are taken while it wants more requests than that
--       12… lanes that this worker took jobs of, its first in front
-- Returns {state, {job id, execution id, number of its list, job hash}…}; lists are numbered
-- from 0; state is 'ok', 'suspended', 'alone' if the next job waits for a worker that is idle or
-- wants more, or 'more' if there may be jobs behind the entries looked at.
-- A queue whose list or registry is somebody's key of another type is passed over.
if redis.call('EXISTS', KEYS[3]) == 1 then
  return {'suspended'}
end
local iso, lease, name, want, prefix = ARGV[1], tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4]), ARGV[5]
local most, alone, held = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local looks, modest = tonumber(ARGV[10]), tonumber(ARGV[11])
local most_of_other_lanes = 255
local rank, num_lanes = {}, #ARGV - 11
for i = 1, num_lanes do
  rank[ARGV[11 + i]] = i
end
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1e6
local stamp = string.format('%.6f', now)
local reply = {'ok'}

-- Writes nothing, but a full Redis refuses it: what is taken now would have nowhere to put its results.
-- LPOP needs no memory, and where a script has begun to write it may go on.
redis.call('SETRANGE', 'batchmill:room', 0, '')

local function is_fit(key, kind)
  local found = redis.call('TYPE', key).ok
  return found == kind or found == 'none'
end

local lanes = {}
local function lane_of(id)
  if lanes[id] == nil then
    local found = redis.pcall('HGET', prefix .. ':job:' .. id, 'lane')
    lanes[id] = type(found) == 'string' and found
  end
  return lanes[id]
end

-- The next job of a list; nothing, and true, if there are only some that others may want more.
local function pop(list, is_hungry)
  local id = redis.call('LPOP', list)
  local lane = id and lane_of(id)
  if not lane or rank[lane] == 1 then
    return id
  end
  local best, best_rank = id, rank[lane] or math.huge
  for _, other in ipairs(redis.call('LRANGE', list, 0, most_of_other_lanes)) do
    local other_rank = rank[lane_of(other)] or math.huge
    if other_rank < best_rank then
      best, best_rank = other, other_rank
      if best_rank == 1 then
        break
      end
    end
  end
  local is_left = best_rank > 1 and not is_hungry
  if best ~= id then
    redis.call('LPUSH', list, id)
    if not is_left then
      redis.call('LREM', list, 1, best)
    end
  elseif is_left then
    redis.call('LPUSH', list, id)
  end
  if is_left then
    return nil, true
  end
  lane = lane_of(best)
  if not rank[lane] then
    num_lanes = num_lanes + 1
    rank[lane] = num_lanes
  end
  return best
end

for k = 4, #KEYS, 2 do
  while want > 0 and #reply <= most and is_fit(KEYS[k], 'list') and is_fit(KEYS[k + 1], 'zset') do
    if looks <= 0 then
      reply[1] = 'more'
      break
    end
    local id, is_others = pop(KEYS[k], want > modest or held + #reply == 1)
    if is_others then
      reply[1] = 'alone'
    end
    if not id then
      break
    end
    looks = looks - 1
    local job = prefix .. ':job:' .. id
    -- pcall: somebody's key of another type under a job's name must not stop the queue
    local known = redis.pcall('HMGET', job, 'status', 'batch_size', 'deaths', 'claims')
    if known.err and not string.find(known.err, 'WRONGTYPE', 1, true) then
      -- such as a user who may not read jobs: nothing is to be lost by that
      redis.call('LPUSH', KEYS[k], id)
      if #reply == 1 then
        return known
      end
      want = 0
      break
    end
    local is_alone = (tonumber(known[3] or '') or 0) >= alone
    -- What was cancelled, deleted or pushed twice since is dropped here, as RQ drops it. So is an
    -- id that RQ wouldn't make: a colon in it would be taken for an execution's.
    if known[1] == 'queued' and is_alone and held + #reply > 1 then
      redis.call('LPUSH', KEYS[k], id)
      reply[1] = 'alone'
      want = 0
    elseif known[1] == 'queued' and string.find(id, '^[%w_-]+$') then
      local execution = ARGV[6] .. string.format('%08x', #reply)
      local composite = id .. ':' .. execution
      local executions = prefix .. ':executions:' .. id
      local claims = tonumber(known[4] or '') or 0
      claims = claims > 0 and claims < 2 ^ 31 and math.floor(claims) + 1 or 1
      redis.call('HSET', job, 'status', 'started', 'started_at', iso, 'last_heartbeat', iso,
        'worker_name', name, 'claimed_by', name, 'claims', claims)
      redis.call('PERSIST', job)
      redis.call('HSET', prefix .. ':execution:' .. composite, 'id', execution, 'job_id', id,
        'created_at', stamp, 'last_heartbeat', stamp, 'worker_name', name)
      redis.call('EXPIRE', prefix .. ':execution:' .. composite, lease + 60)
      -- only RQ's tools read this one
      if is_fit(executions, 'zset') then
        redis.call('ZADD', executions, now + lease + 60, execution)
        redis.call('EXPIRE', executions, lease + 60)
      end
      redis.call('ZADD', KEYS[k + 1], now + lease, composite)
      redis.call('SADD', KEYS[2], composite)
      want = is_alone and 0 or want - math.max(1, tonumber(known[2] or '') or 1)
      reply[#reply + 1] = {id, execution, (k - 4) / 2, redis.call('HGETALL', job)}
    end
  end
end
if #reply > 1 then
  redis.call('EXPIRE', KEYS[2], lease + 60)
  redis.call('HSET', KEYS[1], 'state', 'busy')
end
return reply
