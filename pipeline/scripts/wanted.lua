-- Which of an owner's handles are still wanted: those that their request still names.
-- KEYS: root
-- ARGV: for each handle: request id, handle id
-- Answers: one number a handle: 1 wanted, 0 free it
-- Called twice: it only reads.
local answers = {}
for i = 1, #ARGV, 2 do
  answers[#answers + 1] = redis.call('HGET', key_req(ARGV[i]), 'handle_id') == ARGV[i + 1] and 1 or 0
end
return answers
