-- Forgets what an ended request was asked and what it said. Its state stays until its record expires, so that nobody who still serves or
-- reads it takes it for lost and brings it back.
-- KEYS: root
-- ARGV: id
-- Answers: {'gone', ''} | {'kept', state} while it lives: then nothing is changed | {'erased', state}
-- Called twice: there is nothing left to erase, and the state is still there.
local id = ARGV[1]
local req = key_req(id)
local h = redis.call('HMGET', req, 'state', 'n', 'idem')
if not h[1] then return {'gone', ''} end
if not is_ended(h[1]) then return {'kept', h[1]} end
for choice = 0, tonumber(h[2]) - 1 do redis.call('DEL', key_log(id, choice), key_probs(id, choice)) end
redis.call('DEL', key_pprobs(id))
if h[3] and h[3] ~= '' and redis.call('GET', key_idem(h[3])) == id then redis.call('DEL', key_idem(h[3])) end
redis.call('HDEL', req, 'body', 'result', 'idem')
return {'erased', h[1]}
