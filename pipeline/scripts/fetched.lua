-- The decode worker has the blocks and the request runs: clears the handle and tells its owner to free them.
-- KEYS: root
-- ARGV: id, epoch, worker, why ('' when fetched or never sent, else the reason for which blocks were computed again),
--       cached prompt tokens or '' to leave what the hand-over said
-- Answers: {'ok'} | {'fenced'} | {'ended', state}
-- Called twice: the epoch is kept, so nothing is counted again and the answer is 'ok'.
local id, epoch, worker, why, cached = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local req = key_req(id)
local h = redis.call('HMGET', req, 'state', 'epoch', 'owner', 'handle_id', 'handle_owner', 'fetched_epoch', 'stage')
if not h[1] then return {'ended', 'gone'} end
if is_ended(h[1]) then return {'ended', h[1]} end
if h[1] ~= 'running' or h[2] ~= epoch or h[3] ~= worker or h[7] ~= 'decode' then return {'fenced'} end
if h[6] == epoch then return {'ok'} end
allow_writes()
free_handle(id, h[4], h[5])
redis.call('HSET', req, 'fetched_epoch', epoch, 't_fetched', now_us())
if cached ~= '' then redis.call('HSET', req, 'cached', cached) end
if why ~= '' then count('kv_recomputed:' .. why, 1) end
return {'ok'}
