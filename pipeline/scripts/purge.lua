-- Ends requests that wait on a lane, as cancelled; a part of the lane a call, with the first call also (of the 10,000 next
-- ones) those that were admitted for later. It trims nothing: the entries of ended requests are deleted by `finish`, the next claim or the next sweep, as always.
-- KEYS: root
-- ARGV: stage, lane, cursor ('-' to begin, then what the last call answered), last entry id to look at, how many entries to look
--       at, nonce of this purge
-- Answers: {how many requests this call has ended, next cursor or '' at the end}
-- Called twice: the answer to a cursor is kept for a minute and given again.
local stage, lane, cursor, last, limit, nonce = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5]), ARGV[6]
local said = redis.call('HGET', key_purged(nonce), cursor)
if said then return cmsgpack.unpack(said) end

allow_writes()
local purged, next_cursor = 0, ''
local function purge(id)
  finish(id, 'cancelled', 'purged', '')
  purged = purged + 1
end
if cursor == '-' then
  for _, id in ipairs(redis.call('ZRANGE', key_delayed(), 0, 9999)) do
    local h = redis.call('HMGET', key_req(id), 'stage', 'lane', 'entry')
    if h[1] == stage and h[2] == lane and h[3] == '' then purge(id) end
  end
end
local rows = redis.call('XRANGE', key_lane(stage, lane), cursor, last, 'COUNT', limit)
for _, row in ipairs(rows) do
  local e = entry_of(stage, lane, row[1], row[2])
  if e then purge(e.id) end
  next_cursor = '(' .. row[1]
end
if #rows < limit then next_cursor = '' end
local answer = {purged, next_cursor}
redis.call('HSET', key_purged(nonce), cursor, cmsgpack.pack(answer))
redis.call('EXPIRE', key_purged(nonce), 60)
return answer
