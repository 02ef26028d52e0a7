-- Brings a batch from one state to another. Of one that has ended, parts are still to be removed, and requests to be forgotten.
-- KEYS: root of batches
-- ARGV: id, epoch of who holds it ('' for others), states that it may be in (with spaces around each), the new state, 1 where that is an
--   end, seconds that the record of a batch is kept after its end, then fields and their values in turn
-- Answers: {'turned', state} | {'kept', state} | {'fenced', state} | {'gone', ''}
-- Called twice: the second finds the new state, writes the fields again and says 'turned' again.
allow_writes() -- where Redis is full: what is kept lets it drop more
local id, epoch, from, to, ends, keep = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local batch = root .. 'batch:' .. id
local now = redis.call('HMGET', batch, 'state', 'epoch', 'owner')
if not now[1] then return {'gone', ''} end
if epoch ~= '' and epoch ~= now[2] then return {'fenced', now[1]} end
if now[1] ~= to and not string.find(from, ' ' .. now[1] .. ' ', 1, true) then return {'kept', now[1]} end
redis.call('HSET', batch, 'state', to, unpack(ARGV, 7))
if ends == '1' then
  redis.call('ZREM', root .. 'open', id)
  redis.call('DEL', root .. 'lease:' .. id, root .. 'done:' .. id)
  redis.call('EXPIRE', batch, keep)
end
return {'turned', to}
