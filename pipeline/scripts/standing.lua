-- How requests stand, many at once and without their logs: for who waits for results.
-- KEYS: root
-- ARGV: with results ('1' or ''), then ids
-- Answers: for each id {} when unknown | {state, reason, stage, choices, waits for its next try ('1' or ''), result or ''}
-- Called twice: it only reads.
local answers = {}
for i = 2, #ARGV do
  local id = ARGV[i]
  local h = redis.call('HMGET', key_req(id), 'state', 'reason', 'stage', 'n', 'epoch')
  if h[1] then
    local is_retry = h[5] ~= '0' and redis.call('ZSCORE', key_delayed(), id)
    local result = ARGV[1] == '1' and redis.call('HGET', key_req(id), 'result')
    answers[#answers + 1] = {h[1], h[2] or '', h[3], h[4], is_retry and '1' or '', result or ''}
  else
    answers[#answers + 1] = {}
  end
end
return answers
