-- What a reader needs to go on: where the request stands, its logs and why its choices ended. With `watch` its tokens are from
-- now on also published on the request's own channel, and nobody misses a reader any more.
-- KEYS: root
-- ARGV: id, watch ('1' or ''), with the stored request ('1' or '')
-- Answers: {} when unknown | {state, reason, stage, prompt tokens, completion tokens, cached tokens,
--          the seven times of the timeline in us (0: did not happen), lane, attempts, linger ms ('': to its end), stored request or '',
--          (log, finish reason, records of log probabilities or '') of each choice ...}
-- Called twice: it reads, and sets the same flag.
local id, watch, with_request = ARGV[1], ARGV[2], ARGV[3]
local h = redis.call('HMGET', key_req(id), 'state', 'reason', 'stage', 'tokens', 'completion', 'cached', 'n', 'lane', 'attempts',
  'linger')
if not h[1] then return {} end
if watch == '1' and not is_ended(h[1]) then
  redis.call('ZREM', key_orphans(), id) -- a first write that Redis allows when memory is full
  redis.call('HSET', key_req(id), 'watch', '1')
end
local answer = {h[1], h[2] or '', h[3], h[4], h[5] or 0, h[6] or 0}
local times = redis.call('HMGET', key_req(id), 't_admitted', 't_claimed_prefill', 't_handover', 't_claimed_decode', 't_fetched',
  't_first_token', 't_ended')
for i = 1, 7 do answer[#answer + 1] = times[i] or 0 end
answer[#answer + 1] = h[8] or ''
for i = 9, 10 do answer[#answer + 1] = h[i] or '0' end
answer[#answer + 1] = with_request == '1' and redis.call('HGET', key_req(id), 'body') or ''
for choice = 0, tonumber(h[7]) - 1 do
  answer[#answer + 1] = redis.call('GET', key_log(id, choice)) or ''
  answer[#answer + 1] = redis.call('HGET', key_req(id), 'fin:' .. choice) or ''
  answer[#answer + 1] = redis.call('GET', key_probs(id, choice)) or ''
end
return answer
