-- Stores a request once and puts its first task on a lane.
-- KEYS: root
-- ARGV: id, stage, lane, body, prompt tokens, blocks, n, wire version, api, deadline s, result ttl s,
--       max waiting tasks, max waiting tokens, idempotency key or '', priority (high, default, low),
--       id of the dead-lettered request that this one repeats, or ''
-- Answers: {'ok', waiting tasks of the lane} | {'duplicate', id of the first} | {'full', waiting tasks, waiting tokens}
-- Called twice: the request exists, so the answer is 'ok' again.
local id, stage, lane, body = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local tokens, blocks, n, version, api = ARGV[5], ARGV[6], ARGV[7], ARGV[8], ARGV[9]
local deadline_s, ttl, max_tasks, max_tokens, idem = ARGV[10], ARGV[11], ARGV[12], ARGV[13], ARGV[14]
local priority, replay_of = ARGV[15], ARGV[16] or ''

local waiting = redis.call('HMGET', key_counters(), 'waiting:' .. stage .. ':' .. lane, 'tokens:' .. stage .. ':' .. lane)
local tasks_waiting, tokens_waiting = tonumber(waiting[1] or 0), tonumber(waiting[2] or 0)
if redis.call('EXISTS', key_req(id)) == 1 then return {'ok', tasks_waiting} end
if idem ~= '' then
  local first = redis.call('GET', key_idem(idem))
  if first then return {'duplicate', first} end
end
if tasks_waiting >= tonumber(max_tasks) or tokens_waiting + tonumber(tokens) > tonumber(max_tokens) then
  return {'full', tasks_waiting, tokens_waiting}
end
local now = now_us()
local deadline = math.floor(tonumber(now) / 1000 + tonumber(deadline_s) * 1000)
redis.call('HSET', key_req(id), 'body', body, 'epoch', 0, 'api', api, 'tokens', tokens, 'blocks', blocks, 'n', n, 'v', version,
  'deadline', string.format('%.0f', deadline), 'ttl', ttl, 'idem', idem, 'attempts', 0, 'priority', priority, 't_admitted', now)
redis.call('ZADD', key_deadlines(), string.format('%.0f', deadline), id)
if idem ~= '' then redis.call('SET', key_idem(idem), id) end
if replay_of ~= '' then redis.call('HSET', key_req(id), 'replay_of', replay_of) end
count('admitted', 1)
enqueue(id, stage, lane, tokens, blocks, version)
event('task-sent', id, stage, lane, '', replay_of)
return {'ok', tasks_waiting + 1}
