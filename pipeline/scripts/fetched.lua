-- The decode worker has the blocks: clears the handle and tells its owner to free them.
-- KEYS: root
-- ARGV: id, epoch, worker, why ('' when fetched, else the reason for which the blocks are recomputed)
-- Answers: {'ok'} | {'fenced'} | {'ended', state}
-- Called twice: the second call finds no handle and answers 'ok'.
local id, epoch, worker, why = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local h = redis.call('HMGET', key_req(id), 'state', 'epoch', 'owner', 'handle_id', 'handle_owner', 't_fetched')
if not h[1] then return {'ended', 'gone'} end
if is_ended(h[1]) then return {'ended', h[1]} end
if h[1] ~= 'running' or h[2] ~= epoch or h[3] ~= worker then return {'fenced'} end
if h[4] then
  free_handle(id, h[4], h[5])
  redis.call('HSET', key_req(id), 't_fetched', now_us())
  if why ~= '' then count('kv_recomputed:' .. why, 1) end
end
return {'ok'}
