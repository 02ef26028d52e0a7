-- Takes up a batch that has not ended and that nobody holds: from now on what others say of it who held it before is fenced.
-- KEYS: root of batches
-- ARGV: id, who takes it, lease in ms
-- Answers: {'taken', epoch} | {'held', by whom} | {'ended', state} | {'gone'}
-- Called twice: the same epoch for who holds it already.
allow_writes() -- where Redis is full: what is kept lets it drop more
local id, worker, lease = ARGV[1], ARGV[2], ARGV[3]
local batch = root .. 'batch:' .. id
local state = redis.call('HGET', batch, 'state')
if not state then
  redis.call('ZREM', root .. 'open', id)
  return {'gone'}
end
if redis.call('ZSCORE', root .. 'open', id) == false then return {'ended', state} end
local holder = redis.call('GET', root .. 'lease:' .. id)
if holder and holder ~= worker then return {'held', holder} end
redis.call('SET', root .. 'lease:' .. id, worker, 'PX', lease)
if holder then return {'taken', redis.call('HGET', batch, 'epoch')} end
return {'taken', tostring(redis.call('HINCRBY', batch, 'epoch', 1))}
