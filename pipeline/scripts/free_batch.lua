-- Lets a batch go that a worker holds: somebody else may take it up at once.
-- KEYS: root of batches
-- ARGV: id, who holds it
-- Answers: 1 where it was held by this worker, else 0
-- Called twice: nothing is left to let go, and what somebody else holds by now is left alone.
local lease = root .. 'lease:' .. ARGV[1]
if redis.call('GET', lease) ~= ARGV[2] then return 0 end
return redis.call('DEL', lease)
