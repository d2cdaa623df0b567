-- Let leases run out now: the engine failed while it had these jobs, so one of them may be the
-- cause. reclaim.lua then treats them as those of a worker that died.
--
-- ARGV  1 RQ's key prefix  2… (queue name, job id, execution id) per job
-- Returns how many leases were still held.
local held = 0
for i = 2, #ARGV, 3 do
  local registry, composite = ARGV[1] .. ':wip:' .. ARGV[i], ARGV[i + 1] .. ':' .. ARGV[i + 2]
  -- pcall: a registry that is somebody's key of another type must not hold the others
  if type(redis.pcall('ZSCORE', registry, composite)) == 'string' then
    redis.call('ZADD', registry, 'XX', 0, composite)
    held = held + 1
  end
end
return held
