-- Write tokens into a partial text, from the offset on, unless that would leave a gap: the text may
-- have been deleted meanwhile, because somebody else has finished the request.
--
-- KEYS  1 partial text
-- ARGV  1 offset (bytes)  2 tokens  3 time to live (seconds)
-- Returns the length of the text (bytes); less than the offset if nothing was written.
local length = redis.call('STRLEN', KEYS[1])
if length < tonumber(ARGV[1]) then
  return length
end
-- from its start: what stood there may be of another's making, and longer
if tonumber(ARGV[1]) == 0 then
  redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
  return #ARGV[2]
end
length = redis.call('SETRANGE', KEYS[1], ARGV[1], ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[3])
return length
