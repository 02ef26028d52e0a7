-- Makes a batch known. Not of a pool: its root is that of all batches.
-- KEYS: root of batches
-- ARGV: id, owner, idempotency key ('' for none), seconds that it stands for this batch, digest of what was asked under it, then the
--   batch's fields and their values in turn
-- Answers: {'kept', id} | {'first', id of the batch that the key stands for already} | {'conflict', its id}, where another one was asked for
-- Called twice: the same id.
local id, owner, key, ttl, digest = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
if key ~= '' then
  local first = redis.call('GET', root .. 'idem:' .. key)
  local known = first and string.match(first, '^%S+')
  if known and known ~= id then return {first == known .. ' ' .. digest and 'first' or 'conflict', known} end
  redis.call('SET', root .. 'idem:' .. key, id .. ' ' .. digest, 'EX', ttl)
end
if redis.call('EXISTS', root .. 'batch:' .. id) == 1 then return {'kept', id} end -- it may be on its way already
redis.call('HSET', root .. 'batch:' .. id, unpack(ARGV, 6))
local list = root .. 'list:' .. owner
for _, old in ipairs(redis.call('ZRANGE', list, 0, 1)) do -- of an owner who never lists it, too, it stays as long as what there is
  if redis.call('EXISTS', root .. 'batch:' .. old) == 0 then redis.call('ZREM', list, old) end
end
redis.call('ZADD', list, 0, id)
redis.call('ZADD', root .. 'open', 0, id)
return {'kept', id}
