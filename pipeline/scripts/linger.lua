-- The last reader has left: unless one comes back in time, the sweep cancels the request.
-- KEYS: root
-- ARGV: id, seconds
-- Answers: {'lingers'} | {'ended', state}
-- Called twice: the time runs from the last call.
local id, seconds = ARGV[1], tonumber(ARGV[2])
local state = redis.call('HGET', key_req(id), 'state')
if not state then return {'ended', 'gone'} end
if is_ended(state) then return {'ended', state} end
allow_writes()
local due = math.floor(tonumber(now_us()) / 1000 + seconds * 1000)
redis.call('ZADD', key_orphans(), string.format('%.0f', due), id)
return {'lingers'}
