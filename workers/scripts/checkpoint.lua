-- Append tokens to a partial text, unless that would leave a gap: the text may have been deleted
-- meanwhile, because somebody else has finished the request.
--
-- KEYS  1 partial text
-- ARGV  1 offset (bytes)  2 tokens  3 time to live (seconds)
-- Returns the length of the text (bytes); less than the offset if nothing was written.
local length = redis.call('STRLEN', KEYS[1])
if length < tonumber(ARGV[1]) then
  return length
end
length = redis.call('SETRANGE', KEYS[1], ARGV[1], ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[3])
return length
