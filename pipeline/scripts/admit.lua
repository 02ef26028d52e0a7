-- Stores a request once and puts its first task on a lane, at once or after a delay.
-- KEYS: root
-- ARGV: id, stage, lane, body, prompt tokens, blocks, n, wire version, api, deadline s, result ttl s, dead ttl s,
--       priority (high, default, low), idempotency key or '', linger ms (how long it goes on after its API process ended; '' for
--       ever), delay ms, max waiting tasks, max waiting tokens, process that wants to hear of the end alone or ''
-- Answers: {'ok', waiting tasks of the lane} | {'duplicate', id of the first} | {'full', waiting tasks, waiting tokens}
-- Called twice: the request exists, so the answer is 'ok' again.
local r = request_of(ARGV)
local max_tasks, max_tokens = tonumber(ARGV[17]), tonumber(ARGV[18])

local waiting = redis.call('HMGET', key_counters(), 'waiting:' .. r.stage .. ':' .. r.lane, 'tokens:' .. r.stage .. ':' .. r.lane)
local tasks_waiting, tokens_waiting = tonumber(waiting[1] or 0), tonumber(waiting[2] or 0)
if redis.call('EXISTS', key_req(r.id)) == 1 then return {'ok', tasks_waiting} end
if r.idem ~= '' then
  local first = redis.call('GET', key_idem(r.idem))
  if first then return {'duplicate', first} end
end
if tasks_waiting >= max_tasks or tokens_waiting + tonumber(r.tokens) > max_tokens then
  return {'full', tasks_waiting, tokens_waiting}
end
store(r, 0)
if (ARGV[19] or '') ~= '' then redis.call('HSET', key_req(r.id), 'notify', ARGV[19]) end
if r.idem ~= '' then redis.call('SET', key_idem(r.idem), r.id) end
count('admitted', 1)
return {'ok', tasks_waiting + 1}
