-- Stores a request once and puts its first task on a lane.
-- KEYS: root
-- ARGV: id, stage, lane, body, prompt tokens, blocks, n, wire version, api, deadline s, result ttl s,
--       max waiting tasks, max waiting tokens, idempotency key or '', priority (high, default, low),
--       digest of what the key stands for, seconds without a reader after which it is cancelled ('0': at once)
-- Answers: {'ok', waiting tasks of the lane} | {'duplicate', id of the first} | {'conflict', id of the first}
--          | {'full', waiting tasks, waiting tokens}
-- Called twice: the request exists, so the answer is 'ok' again.
-- A key names its first request while that lives or is done. One that came to nothing gives way to the next with the same digest.
local id, stage, lane, body = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local tokens, blocks, n, version, api = ARGV[5], ARGV[6], ARGV[7], ARGV[8], ARGV[9]
local deadline_s, ttl, max_tasks, max_tokens, idem = ARGV[10], ARGV[11], ARGV[12], ARGV[13], ARGV[14]
local priority, digest, linger_s = ARGV[15], ARGV[16] or '', ARGV[17] or '0'

local waiting = redis.call('HMGET', key_counters(), 'waiting:' .. stage .. ':' .. lane, 'tokens:' .. stage .. ':' .. lane)
local tasks_waiting, tokens_waiting = tonumber(waiting[1] or 0), tonumber(waiting[2] or 0)
if redis.call('EXISTS', key_req(id)) == 1 then return {'ok', tasks_waiting} end
if idem ~= '' then
  local first = redis.call('GET', key_idem(idem))
  local h = redis.call('HMGET', key_req(first or ''), 'state', 'digest')
  if h[1] and h[2] ~= digest then return {'conflict', first} end
  if h[1] and (h[1] == 'done' or not is_ended(h[1])) then return {'duplicate', first} end
end
if tasks_waiting >= tonumber(max_tasks) or tokens_waiting + tonumber(tokens) > tonumber(max_tokens) then
  return {'full', tasks_waiting, tokens_waiting}
end
local now = now_us()
local deadline = math.floor(tonumber(now) / 1000 + tonumber(deadline_s) * 1000)
redis.call('HSET', key_req(id), 'body', body, 'epoch', 0, 'api', api, 'tokens', tokens, 'blocks', blocks, 'n', n, 'v', version,
  'deadline', string.format('%.0f', deadline), 'ttl', ttl, 'idem', idem, 'attempts', 0, 'priority', priority, 't_admitted', now)
redis.call('ZADD', key_deadlines(), string.format('%.0f', deadline), id)
if idem ~= '' then
  redis.call('SET', key_idem(idem), id)
  redis.call('HSET', key_req(id), 'digest', digest)
end
if linger_s ~= '0' then redis.call('HSET', key_req(id), 'linger', linger_s) end
count('admitted', 1)
enqueue(id, stage, lane, tokens, blocks, version)
return {'ok', tasks_waiting + 1}
