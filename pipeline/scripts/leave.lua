-- A worker has left in good order: forget it at once, or as soon as its own lane is empty.
-- KEYS: root
-- ARGV: role, name
-- Answers: 1
-- Called twice: there is nothing left to forget.
local own = key_lane(ARGV[1], '@' .. ARGV[2])
if redis.call('XLEN', own) > 0 then -- sweeps move what waits there, then forget the name
  if redis.call('ZADD', key_alive(ARGV[1]), 'XX', 'CH', 0, ARGV[2]) == 1 then ring('pool') end
else
  redis.call('DEL', own)
  if redis.call('ZREM', key_alive(ARGV[1]), ARGV[2]) == 1 then ring('pool') end
end
if redis.call('DEL', key_worker(ARGV[2])) == 1 then event('worker-offline', '', ARGV[1], '', ARGV[2], 'left') end
for _, stage in ipairs({'prefill', 'decode'}) do
  for _, lane in ipairs({'high', 'default', 'low', '@' .. ARGV[2]}) do
    local lane_key = key_lane(stage, lane)
    if redis.call('EXISTS', lane_key) == 1 then
      last_delivered(lane_key)
      if #redis.call('XPENDING', lane_key, GROUP, '-', '+', 1, ARGV[2]) == 0 then
        redis.call('XGROUP', 'DELCONSUMER', lane_key, GROUP, ARGV[2])
      end
    end
  end
end
return 1
