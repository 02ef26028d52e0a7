-- Ends requests that wait on a lane, as cancelled; a part of the lane a call. It trims nothing: the entries of ended requests are
-- deleted by the next claim or sweep, as always.
-- KEYS: root
-- ARGV: stage, lane, cursor ('-' to begin, then what the last call answered), last entry id to look at, how many entries to look
--       at, nonce of this purge
-- Answers: {how many requests this purge has ended among them, next cursor or '' at the end}
-- Called twice: what this purge has ended is known by its nonce and counted again, so the answer is the first one.
local stage, lane, cursor, last, limit, nonce = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5]), ARGV[6]
local purged, next_cursor = 0, ''
local rows = redis.call('XRANGE', key_lane(stage, lane), cursor, last, 'COUNT', limit)
for _, row in ipairs(rows) do
  local e = entry_of(stage, lane, row[1], row[2])
  if e then
    finish(e.id, 'cancelled', 'purged', '')
    redis.call('HSET', key_req(e.id), 'purge', nonce)
    purged = purged + 1
  else
    for i = 1, #row[2], 2 do
      if row[2][i] == 'id' and redis.call('HGET', key_req(row[2][i + 1]), 'purge') == nonce then purged = purged + 1 end
    end
  end
  next_cursor = '(' .. row[1]
end
if #rows < limit then next_cursor = '' end
return {purged, next_cursor}
