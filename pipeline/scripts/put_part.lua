-- Makes a part of a batch's results known, whose bytes are all there, counts its lines, and notes the requests that are needed no more.
-- KEYS: root of batches
-- ARGV: id, epoch of who holds it, the part (its bytes and its place), lines that succeeded, lines that failed, tokens of prompts, those
--   of them that were cached, tokens of answers, how many lines, their numbers, then the ids of requests
-- Answers: 'kept' | 'fenced'
-- Called twice: a part that is known is not counted again.
allow_writes() -- where Redis is full: what is kept lets it drop more
local id, epoch, place, lines = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[9])
local batch, parts = root .. 'batch:' .. id, root .. 'parts:' .. id
if redis.call('HGET', batch, 'epoch') ~= epoch or not redis.call('ZSCORE', root .. 'open', id) then return 'fenced' end
if redis.call('LINDEX', parts, -1) == place then return 'kept' end
redis.call('RPUSH', parts, place)
for at, field in ipairs({'completed', 'failed', 'prompt_tokens', 'cached_tokens', 'completion_tokens'}) do
  redis.call('HINCRBY', batch, field, ARGV[3 + at])
end
for at = 10, 9 + lines do redis.call('SETBIT', root .. 'done:' .. id, ARGV[at], 1) end
for at = 10 + lines, #ARGV do redis.call('SADD', root .. 'spent:' .. id, ARGV[at]) end
redis.call('SADD', root .. 'untidy', id)
return 'kept'
