-- Keeps what a worker has found out of a request's prompt (its log probabilities), a part at a time, before the first token is told.
-- What is there stays: who computes the prompt again finds the same but for the noise of sums, and no reader sees two answers.
-- KEYS: root
-- ARGV: id, epoch, worker, where the part begins (bytes), the part
-- Answers: {'ok', bytes that are there now} | {'fenced'} | {'ended', state}
-- Called twice: the part is there, so nothing is added and the answer is the first one again.
local id, epoch, worker, offset, part = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
allow_writes()
local h = redis.call('HMGET', key_req(id), 'state', 'epoch', 'owner')
if not h[1] then return {'ended', 'gone'} end
if is_ended(h[1]) then return {'ended', h[1]} end
if h[1] ~= 'running' or h[2] ~= epoch or h[3] ~= worker then return {'fenced'} end
local there = redis.call('STRLEN', key_pprobs(id))
if there == offset then there = redis.call('APPEND', key_pprobs(id), part) end
return {'ok', there}
