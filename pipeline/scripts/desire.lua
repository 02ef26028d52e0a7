-- What was decided for a pool: how many workers each stage should have, for metrics and for whoever listens.
-- KEYS: root
-- ARGV: holder of the lease, when it was decided in ms, then for each stage: its name, workers before, workers desired, why
-- Answers: 1; 0 where somebody else scales the pool
-- Called twice: a decision of that time is known, so it is counted and told once.
local holder, when = ARGV[1], ARGV[2]
local scaling = key_scaling()
if redis.call('GET', key_scaler()) ~= holder then return 0 end
allow_writes()
for i = 3, #ARGV, 4 do
  local stage, before, desired, why = ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2]), ARGV[i + 3]
  if redis.call('HGET', scaling, 'at:' .. stage) ~= when then
    redis.call('HSET', scaling, 'desired:' .. stage, desired, 'why:' .. stage, why, 'at:' .. stage, when)
    if desired ~= before then
      redis.call('HINCRBY', scaling, (desired > before and 'ups:' or 'downs:') .. stage, 1)
      event('stage-scaled', '', stage, '', '', before .. ' -> ' .. desired .. ': ' .. why)
    end
  end
end
return 1
