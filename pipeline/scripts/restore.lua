-- The API process that serves a request brings back what Redis lost of it (a restart or a fail-over that cost the last writes):
-- the request itself, or the end of its logs. Its task then waits again with these logs; whoever ran it is fenced.
-- KEYS: root
-- ARGV: id ... API key whose slot it takes as for admit, then for each choice: packed tokens that its client was sent, finish reason or ''
-- Answers: {'ok'} | {'ended', state} | {'diverged', choice} (other tokens stand in the log: nothing is changed)
-- Called twice: the logs hold what was sent, so nothing is changed and the answer is 'ok' again.
local r = request_of(ARGV)
local req = key_req(r.id)
allow_writes()

local h = redis.call('HMGET', req, 'state', 'stage', 'lane', 'entry', 'owner', 'epoch', 'tokens', 'priority')
if h[1] and is_ended(h[1]) then return {'ended', h[1]} end
local lacks = not h[1]
for choice = 0, tonumber(r.n) - 1 do
  local sent = ARGV[21 + 2 * choice]
  local log = redis.call('GET', key_log(r.id, choice)) or ''
  local common = math.min(#log, #sent)
  if string.sub(log, 1, common) ~= string.sub(sent, 1, common) then return {'diverged', choice} end
  if #log < #sent then lacks = true end
end
if not lacks then return {'ok'} end

-- larger than any epoch that was lost: a worker may still hold the request under one of those
local epoch = math.max(tonumber(h[6] or 0) + 1, tonumber(redis.call('TIME')[1]))
for choice = 0, tonumber(r.n) - 1 do
  local sent, reason = ARGV[21 + 2 * choice], ARGV[22 + 2 * choice]
  if #sent > redis.call('STRLEN', key_log(r.id, choice)) then redis.call('SET', key_log(r.id, choice), sent) end
  if reason ~= '' then redis.call('HSET', req, 'fin:' .. choice, reason) end
end
count('restored', 1)
if not h[1] then
  count('admitted', 1) -- that it was counted is lost, too
  store(r, epoch)
  if r.idem ~= '' then redis.call('SET', key_idem(r.idem), r.id, 'NX') end
else
  redis.call('HSET', req, 'epoch', epoch, 'attempts', 0)
  if h[1] == 'running' then
    redis.call('XCLAIM', key_lane(h[2], h[3]), GROUP, PARKED, 0, h[4], 'JUSTID')
    redis.call('HSET', req, 'state', 'queued', 'owner', '')
    count_running(h[2], h[8], r.n, -1)
    count_waiting(h[2], h[3], h[7], 1)
    redis.call('PUBLISH', key_ctl(h[5]), cmsgpack.pack({'cancel', r.id, tonumber(h[6])}))
    ring(h[2])
  end
end
if not has_open_choice(r.id, r.n) then finish(r.id, 'done', '', '') end
return {'ok'}
