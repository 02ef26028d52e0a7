-- Forgets a dead-lettered request for good: its entry in the dead letters and all that is kept of it.
-- KEYS: root
-- ARGV: id, its entry in the dead letters
-- Answers: {'gone'} | {'kept', state} when the request is not a dead one: then nothing is changed
-- Called twice: there is nothing left to forget.
local id, entry = ARGV[1], ARGV[2]
local req = key_req(id)
local h = redis.call('HMGET', req, 'state', 'n', 'idem')
if h[1] and h[1] ~= 'dead' then return {'kept', h[1]} end
redis.call('XDEL', key_dead(), entry)
if h[1] then
  for choice = 0, tonumber(h[2]) - 1 do redis.call('DEL', key_log(id, choice), key_probs(id, choice)) end
  redis.call('DEL', key_pprobs(id))
  if h[3] and h[3] ~= '' and redis.call('GET', key_idem(h[3])) == id then redis.call('DEL', key_idem(h[3])) end
  redis.call('DEL', req)
end
return {'gone'}
