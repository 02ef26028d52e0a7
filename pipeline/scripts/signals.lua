-- How a pool stands at one moment, for who scales it: what waits and since when, what runs, who works and what they say of themselves.
-- KEYS: root
-- ARGV: stages
-- Answers: {time in ms, {counter, value ...}, {field, value ...} as decided by who scales the pool (see desire.lua; empty where nobody does), then for
--          each stage {{lane, when its oldest waiting task came in ms or 0 ...}, {worker, what it says of itself ...}}}. A task that waits for its
--          next try, or for its time, is of no age.
-- Called twice: it only reads.
local now_ms = math.floor(tonumber(now_us()) / 1000)
local decided = redis.call('EXISTS', key_scaler()) == 1 and redis.call('HGETALL', key_scaling()) or {}
local answer = {string.format('%.0f', now_ms), redis.call('HGETALL', key_counters()), decided}

local function came_ms(entry)
  return string.match(entry, '^%d+')
end

-- Where the lane's group stands, or nil where nobody has read it yet.
local function delivered(lane_key)
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', lane_key)) do
    for i = 1, #group, 2 do
      if group[i] == 'last-delivered-id' then return group[i + 1] end
    end
  end
end

-- The oldest of those that nobody was given, and of those that are parked. Entries of ended requests may be among them for a moment.
local function oldest(lane_key)
  if redis.call('XLEN', lane_key) == 0 then return '0' end
  local last = delivered(lane_key)
  local row = last and peek_after(lane_key, last) or not last and redis.call('XRANGE', lane_key, '-', '+', 'COUNT', 1)[1]
  local parked = last and redis.call('XPENDING', lane_key, GROUP, '-', '+', 1, PARKED)[1]
  local new_ms, parked_ms = row and came_ms(row[1]), parked and came_ms(parked[1])
  if new_ms and parked_ms then return tonumber(new_ms) < tonumber(parked_ms) and new_ms or parked_ms end
  return new_ms or parked_ms or '0'
end

for _, stage in ipairs(ARGV) do
  local lanes, workers = {}, {}
  for _, lane in ipairs({'high', 'default', 'low'}) do
    lanes[#lanes + 1] = lane
    lanes[#lanes + 1] = oldest(key_lane(stage, lane))
  end
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', key_alive(stage), now_ms, '+inf')) do
    workers[#workers + 1] = name
    workers[#workers + 1] = redis.call('HGET', key_worker(name), 'info') or ''
  end
  answer[#answer + 1] = {lanes, workers}
end
return answer
