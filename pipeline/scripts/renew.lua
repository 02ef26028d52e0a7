-- A worker (or API process) says that it lives, and renews the leases of the tasks it holds.
-- KEYS: root
-- ARGV: role, name, info, lease ms, then for each task: id, epoch
-- Answers: one number a task: 1 still this worker's, 0 not any more (stop it locally)
-- Called twice: renewing again changes nothing but the time.
local role, name, info, lease_ms = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('EXPIRE', key_alive(role), 86400) -- allowed when memory is full, so all that follows is
local is_new = redis.call('ZADD', key_alive(role), string.format('%.0f', now_ms + lease_ms), name) == 1
redis.call('PERSIST', key_alive(role))
redis.call('HSET', key_worker(name), 'role', role, 'info', info, 'lease', lease_ms)
redis.call('PEXPIRE', key_worker(name), 3 * lease_ms)
if role ~= 'api' then redis.call('SADD', key_stages(), role) end
if is_new then ring('pool') end
if is_new then event('worker-online', '', role, '', name, '') end
local answers = {}
for i = 5, #ARGV, 2 do
  local h = redis.call('HMGET', key_req(ARGV[i]), 'state', 'epoch', 'owner', 'stage', 'lane', 'entry')
  local mine = h[1] == 'running' and h[2] == ARGV[i + 1] and h[3] == name
  if mine then redis.call('XCLAIM', key_lane(h[4], h[5]), GROUP, name, 0, h[6], 'IDLE', 0, 'JUSTID') end
  answers[#answers + 1] = mine and 1 or 0
end
return answers
