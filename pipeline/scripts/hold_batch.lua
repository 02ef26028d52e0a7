-- Goes on holding a batch, says how many of its lines have answers, kept or not, and hears how it stands.
-- KEYS: root of batches
-- ARGV: id, who holds it, its epoch, lease in ms, then fields and their values in turn
-- Answers: {'held', state} | {'fenced'}
-- Called twice: the same.
allow_writes() -- where Redis is full: a lease that runs out helps nobody
local id, worker, epoch, lease = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local batch = root .. 'batch:' .. id
local now = redis.call('HMGET', batch, 'epoch', 'state')
if now[1] ~= epoch or not redis.call('ZSCORE', root .. 'open', id) then return {'fenced'} end
local holder = redis.call('GET', root .. 'lease:' .. id)
if holder and holder ~= worker then return {'fenced'} end
redis.call('SET', root .. 'lease:' .. id, worker, 'PX', lease)
if #ARGV > 4 then redis.call('HSET', batch, unpack(ARGV, 5)) end
return {'held', now[2]}
