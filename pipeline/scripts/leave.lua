-- A worker has left in good order: forget it at once, or as soon as its own lane is empty.
-- KEYS: root
-- ARGV: role, name
-- Answers: 1
-- Called twice: there is nothing left to forget.
local own = key_lane(ARGV[1], '@' .. ARGV[2])
if redis.call('XLEN', own) > 0 or redis.call('EXISTS', key_served(ARGV[2])) == 1 then
  -- sweeps move what waits there, and end what it served and could not cancel; then they forget the name
  if redis.call('ZADD', key_alive(ARGV[1]), 'XX', 'CH', 0, ARGV[2]) == 1 then ring('pool') end
else
  redis.call('DEL', own)
  if redis.call('ZREM', key_alive(ARGV[1]), ARGV[2]) == 1 then ring('pool') end
end
if redis.call('DEL', key_worker(ARGV[2])) == 1 then event('worker-offline', '', ARGV[1], '', ARGV[2], 'left') end
forget_consumer(ARGV[1], ARGV[2])
return 1
