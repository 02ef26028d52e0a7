-- Ends a request: done, failed, cancelled. The first call wins, every later one gets its answer.
-- KEYS: root
-- ARGV: id, state, reason, worker or '' (a cancel from outside), epoch or '' (unfenced), result of its task or ''
-- Answers: {state, reason} as it stands now | {'fenced', ''} | {'gone', ''} | {'incomplete', ''} (a decode worker says that it is done,
--          but not every choice has ended in Redis, which lost the end of a log: nothing is changed)
-- Called twice: the state is set, so the answer is the first one again.
local id, state, reason, worker, epoch = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
if epoch ~= '' then
  local h = redis.call('HMGET', key_req(id), 'state', 'epoch', 'owner', 'stage', 'n')
  if h[1] and not is_ended(h[1]) and (h[1] ~= 'running' or h[2] ~= epoch or h[3] ~= worker) then return {'fenced', ''} end
  if state == 'done' and h[1] == 'running' and h[4] == 'decode' and has_open_choice(id, h[5]) then return {'incomplete', ''} end
end
return finish(id, state, reason, worker, ARGV[6])
