-- A supervisor saw a worker die: what it held waits again at once, ahead of new tasks, instead of when its leases run out.
-- KEYS: root
-- ARGV: role, name, max attempts
-- Answers: how many of its tasks wait again or were dead-lettered
-- Called twice: it holds nothing any more, so the answer is 0.
local role, name, max_attempts = ARGV[1], ARGV[2], tonumber(ARGV[3])
local LIMIT = 1000
local given_back = 0
redis.call('ZADD', key_alive(role), 'XX', 0, name) -- sweeps empty its own lane, then forget it
for _, lane in ipairs({'high', 'default', 'low', '@' .. name}) do
  local lane_key = key_lane(role, lane)
  if redis.call('XLEN', lane_key) > 0 then
    last_delivered(lane_key)
    for _, p in ipairs(redis.call('XPENDING', lane_key, GROUP, '-', '+', LIMIT, name)) do
      local id = running_by(lane, lane_key, p[1]) -- pending for this worker, so it is its owner
      if id then
        park(id, true, max_attempts, name .. ' died', 0, 'stuck')
        given_back = given_back + 1
      end
    end
  end
end
if redis.call('DEL', key_worker(name)) == 1 then event('worker-offline', '', role, '', name, 'died') end
ring('pool')
return given_back
