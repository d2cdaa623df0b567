-- Append results to a run: each request's once, whoever ran it and however often.
-- The done bit decides: who sets it appends; everyone later is told that it was set.
--
-- An entry of the stream holds some results, as fields named by the requests' indexes: one
-- XADD for many, and one BITFIELD for all bits, for each command of a script is also logged.
--
-- KEYS  1 run hash  2 result stream  3 done bitmap
-- ARGV  1 time to live of the run (seconds)
--       2… (index, finish reason, prompt tokens, completion tokens, result JSON) per request
-- Returns how many were new; -1 if the run is unknown (deleted or expired: nobody waits).
local most_fields, enough_bytes = 2 * 64, 64 * 1024
if redis.call('EXISTS', KEYS[1]) == 0 then
  return -1
end
local sets = {}
for i = 2, #ARGV, 5 do
  local n = #sets
  sets[n + 1], sets[n + 2], sets[n + 3], sets[n + 4] = 'SET', 'u1', ARGV[i], 1
end
local was_done = redis.call('BITFIELD', KEYS[3], unpack(sets))
local new, prompt_tokens, completion_tokens, reasons = 0, 0, 0, {}
local entry, bytes = {}, 0
for n = 1, #was_done do
  if was_done[n] == 0 then
    local i = 5 * n - 3
    local reason, json = ARGV[i + 1], ARGV[i + 4]
    reasons[reason] = (reasons[reason] or 0) + 1
    prompt_tokens = prompt_tokens + tonumber(ARGV[i + 2])
    completion_tokens = completion_tokens + tonumber(ARGV[i + 3])
    new = new + 1
    entry[#entry + 1], entry[#entry + 2] = ARGV[i], json
    bytes = bytes + #json
    if #entry >= most_fields or bytes >= enough_bytes then
      redis.call('XADD', KEYS[2], '*', unpack(entry))
      entry, bytes = {}, 0
    end
  end
end
if #entry > 0 then
  redis.call('XADD', KEYS[2], '*', unpack(entry))
end
if new > 0 then
  redis.call('HINCRBY', KEYS[1], 'done', new)
  redis.call('HINCRBY', KEYS[1], 'prompt_tokens', prompt_tokens)
  redis.call('HINCRBY', KEYS[1], 'completion_tokens', completion_tokens)
  for reason, count in pairs(reasons) do
    redis.call('HINCRBY', KEYS[1], 'finish:' .. reason, count)
  end
end
if new < #was_done then
  redis.call('HINCRBY', KEYS[1], 'suppressed', #was_done - new)
end
for k = 1, 3 do
  redis.call('EXPIRE', KEYS[k], ARGV[1])
end
return new
