-- Append results to a run: one stream entry per request, whoever ran it and however often.
-- The done bit decides: who sets it appends; everyone later is told that it was set.
--
-- KEYS  1 run hash  2 result stream  3 done bitmap
-- ARGV  1 time to live of the run (seconds)
--       2… (index, finish reason, prompt tokens, completion tokens, result JSON) per request
-- Returns how many were new; -1 if the run is unknown (deleted or expired: nobody waits).
if redis.call('EXISTS', KEYS[1]) == 0 then
  return -1
end
local new, prompt_tokens, completion_tokens = 0, 0, 0
local reasons = {}
for i = 2, #ARGV, 5 do
  if redis.call('SETBIT', KEYS[3], ARGV[i], 1) == 0 then
    redis.call('XADD', KEYS[2], '*', 'index', ARGV[i], 'result', ARGV[i + 4])
    reasons[ARGV[i + 1]] = (reasons[ARGV[i + 1]] or 0) + 1
    prompt_tokens = prompt_tokens + tonumber(ARGV[i + 2])
    completion_tokens = completion_tokens + tonumber(ARGV[i + 3])
    new = new + 1
  end
end
if new > 0 then
  redis.call('HINCRBY', KEYS[1], 'done', new)
  redis.call('HINCRBY', KEYS[1], 'prompt_tokens', prompt_tokens)
  redis.call('HINCRBY', KEYS[1], 'completion_tokens', completion_tokens)
  for reason, count in pairs(reasons) do
    redis.call('HINCRBY', KEYS[1], 'finish:' .. reason, count)
  end
end
for k = 1, 3 do
  redis.call('EXPIRE', KEYS[k], ARGV[1])
end
return new
