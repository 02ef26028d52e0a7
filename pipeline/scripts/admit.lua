-- Stores a request once and puts its first task on a lane, at once or after a delay.
-- KEYS: root
-- ARGV: id, stage, lane, body, prompt tokens, blocks, n, wire version, api, deadline s, result ttl s, dead ttl s,
--       priority (high, default, low), idempotency key or '', linger ms (how long it goes on without a reader, or after its API
--       process ended; '' to its end), delay ms, id of the dead-lettered request that this one repeats or '', digest of what the
--       idempotency key stands for, process that wants to hear of the end alone or '', API key whose slot it takes or '',
--       max waiting tasks, max waiting tokens, slots of the API key (0: as many as it likes)
-- Answers: {'ok', waiting tasks of the lane} | {'duplicate', id of the first} | {'conflict', id of the first}
--          | {'busy', requests of the API key} | {'full', waiting tasks, waiting tokens}
-- Called twice: the request exists, so the answer is 'ok' again.
-- A key names its first request while that lives or is done. One that came to nothing gives way to the next with the same digest.
local r = request_of(ARGV)
local max_tasks, max_tokens, max_held = tonumber(ARGV[21]), tonumber(ARGV[22]), tonumber(ARGV[23])
local LOOKED_AT = 64 -- slots of a busy key that are looked at

-- How many slots of the key are taken. Where that is all of them they are looked at: a process of a version that does not know of
-- slots may have ended a request, and none is lost that way.
local function held_by(holder)
  local held = redis.call('SCARD', key_held(holder))
  if held < max_held then return held end
  for _, id in ipairs(redis.call('SRANDMEMBER', key_held(holder), LOOKED_AT)) do
    local state = redis.call('HGET', key_req(id), 'state')
    if not state or is_ended(state) then held = held - redis.call('SREM', key_held(holder), id) end
  end
  return held
end

local waiting = redis.call('HMGET', key_counters(), 'waiting:' .. r.stage .. ':' .. r.lane, 'tokens:' .. r.stage .. ':' .. r.lane)
local tasks_waiting, tokens_waiting = tonumber(waiting[1] or 0), tonumber(waiting[2] or 0)
if redis.call('EXISTS', key_req(r.id)) == 1 then return {'ok', tasks_waiting} end
if r.idem ~= '' then
  local first = redis.call('GET', key_idem(r.idem))
  local h = redis.call('HMGET', key_req(first or ''), 'state', 'digest')
  if h[1] and h[2] ~= r.digest then return {'conflict', first} end
  if h[1] and (h[1] == 'done' or not is_ended(h[1])) then return {'duplicate', first} end
end
if max_held > 0 then
  local held = held_by(r.holder)
  if held >= max_held then return {'busy', held} end
end
if tasks_waiting >= max_tasks or tokens_waiting + tonumber(r.tokens) > max_tokens then
  return {'full', tasks_waiting, tokens_waiting}
end
store(r, 0)
if r.idem ~= '' then redis.call('SET', key_idem(r.idem), r.id) end
redis.call('SADD', key_stages(), r.stage) -- sweeps visit it and operators see it, with no worker of it yet
count('admitted', 1)
if r.delay_ms == 0 then arrive(r.stage, r.priority, r.tokens) end
event('task-sent', r.id, r.stage, r.lane, '', r.replay_of)
return {'ok', tasks_waiting + 1}
