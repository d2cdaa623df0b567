-- Take over the jobs of one queue whose leases have run out: their worker died or stood still.
-- Each goes back on its queue with one death more, and no retry spent: it needn't be its fault.
-- A job near its last death goes to the end, for it will hold a worker for itself (claim.lua).
--
-- A job's hash gets one field of our own: `deaths`, how many workers died holding it.
--
-- KEYS  1 StartedJobRegistry  2 queue list
-- ARGV  1 RQ's key prefix  2 deaths after which a job is quarantined  3 deaths after which it
--       has a worker for itself  4 most jobs in one call  5 when it is too late to do so (epoch
--       seconds): what was on its way while the server stood still finds everyone's leases lapsed
-- Returns {how many went back, job id and execution id… of those to be quarantined}. The latter
-- are left as they are, so that they are found again if the caller dies as well.
-- pcall: somebody's key of another type under a job's names must not keep the others from running.
local prefix, most_deaths, alone = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local clock = redis.call('TIME')
if clock[1] + clock[2] / 1e6 > tonumber(ARGV[5]) then
  return {0}
end
if redis.call('EXISTS', KEYS[2]) == 1 and redis.call('TYPE', KEYS[2]).ok ~= 'list' then
  return {0}
end
local expired = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', clock[1], 'LIMIT', 0, ARGV[4])
local reply = {0}
for _, composite in ipairs(expired) do
  local id, execution = string.match(composite, '^([^:]*):?(.*)$')
  local job = prefix .. ':job:' .. id
  local execution_key = prefix .. ':execution:' .. composite
  local known = redis.pcall('HMGET', job, 'status', 'deaths', 'worker_name')
  local deaths = tonumber(known[2] or '') or 0
  deaths = deaths > 0 and deaths < 2 ^ 31 and math.floor(deaths) + 1 or 1
  if known[1] == 'started' and deaths >= most_deaths then
    reply[#reply + 1] = id
    reply[#reply + 1] = execution
  else
    redis.call('ZREM', KEYS[1], composite)
    redis.call('DEL', execution_key)
    redis.pcall('ZREM', prefix .. ':executions:' .. id, execution)
    redis.pcall('SREM', prefix .. ':worker:' .. (known[3] or '') .. ':executions', composite)
    -- whatever isn't 'started' was ended or taken over by somebody else: only the lease is left
    if known[1] == 'started' then
      redis.call('HSET', job, 'status', 'queued', 'worker_name', '', 'deaths', deaths)
      redis.call(deaths >= alone and 'RPUSH' or 'LPUSH', KEYS[2], id)
      reply[1] = reply[1] + 1
    end
  end
end
return reply
