-- A worker gives a task back unfinished (drain, engine died, retry): it waits again, ahead of new ones, at once or after a delay.
-- KEYS: root
-- ARGV: id, epoch, worker, counts ('1' when the delivery counts as an attempt), max attempts, why, delay ms,
--       suspect ('always': its engine died, so it runs alone the next time; 'never')
-- Answers: {'parked'} | {'dead'} | {'fenced'} | {'ended', state}
-- Called twice: the second call finds it waiting at the same epoch without an owner and answers 'parked'.
local id, epoch, worker, counts, max_attempts, why = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5]), ARGV[6]
local delay_ms, suspect = tonumber(ARGV[7]), ARGV[8]
local h = redis.call('HMGET', key_req(id), 'state', 'epoch', 'owner', 'handover_epoch')
if not h[1] then return {'ended', 'gone'} end
if h[1] == 'dead' and h[2] == epoch then return {'dead'} end
if is_ended(h[1]) then return {'ended', h[1]} end
if h[1] == 'queued' and h[2] == epoch and h[4] ~= epoch then return {'parked'} end
if h[1] ~= 'running' or h[2] ~= epoch or h[3] ~= worker then return {'fenced'} end
return {park(id, counts == '1', max_attempts, why, delay_ms, suspect)}
