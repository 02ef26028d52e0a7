-- Puts right what nobody else will: ends requests past their deadline, parks tasks whose lease ran out, forgets processes that
-- stopped renewing, empties their own lanes, moves waiting prefill tasks to decode while no prefill worker lives, deletes entries
-- of ended requests. Bounded: what is left is for the next sweep.
-- KEYS: root
-- ARGV: sweeper, interval ms, lease ms, max attempts
-- Answers: {} when another one swept within the interval | {expired, parked, dead, moved, deleted}
-- Called twice: within the interval the second call does nothing.
local sweeper, interval_ms, lease_ms, max_attempts = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local LIMIT = 100
redis.call('ZREMRANGEBYSCORE', key_alive('prefill'), '-inf', '(0') -- removes nothing; a first write allowed when memory is full
if not redis.call('SET', key_sweep(), sweeper, 'NX', 'PX', interval_ms) then return {} end
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local expired, parked, dead, moved, deleted = 0, 0, 0, 0, 0

for _, id in ipairs(redis.call('ZRANGEBYSCORE', key_deadlines(), '-inf', now_ms, 'LIMIT', 0, LIMIT)) do
  local stage = redis.call('HGET', key_req(id), 'stage')
  finish(id, 'expired', 'deadline passed in ' .. (stage or 'waiting'), '')
  redis.call('ZREM', key_deadlines(), id)
  expired = expired + 1
end

local lanes = {}
for _, stage in ipairs({'prefill', 'decode'}) do
  for _, lane in ipairs({'high', 'default', 'low'}) do lanes[#lanes + 1] = {stage, lane} end
  for _, name in ipairs(redis.call('ZRANGE', key_alive(stage), 0, -1)) do lanes[#lanes + 1] = {stage, '@' .. name, name} end
end

local function park_expired(stage, lane, lane_key)
  local from = '-'
  for _ = 1, 4 do
    local rows = redis.call('XPENDING', lane_key, GROUP, 'IDLE', lease_ms, from, '+', LIMIT)
    for _, p in ipairs(rows) do
      from = '(' .. p[1]
      if p[2] ~= PARKED then
        local id = running_by(lane, lane_key, p[1])
        if id then
          if park(id, true, max_attempts, 'lease lost by ' .. p[2]) == 'dead' then dead = dead + 1 else parked = parked + 1 end
        else
          ack(stage, lane, p[1])
          deleted = deleted + 1
        end
      end
    end
    if #rows < LIMIT then return end
  end
end

-- Visits what waits on a lane, parked first; a living task goes to the stage `move`, to its own priority's lane there.
local function visit_waiting(stage, lane, lane_key, move)
  for _, p in ipairs(redis.call('XPENDING', lane_key, GROUP, '-', '+', LIMIT, PARKED)) do
    local row = redis.call('XRANGE', lane_key, p[1], p[1])[1]
    local e = row and entry_of(stage, lane, p[1], row[2])
    if not e then
      ack(stage, lane, p[1])
      deleted = deleted + 1
    elseif move then
      ack(stage, lane, p[1])
      count_waiting(stage, lane, e.tokens, -1)
      enqueue(e.id, move, e.priority, e.tokens, e.blocks, e.v)
      moved = moved + 1
    end
  end
  local cursor = last_delivered(lane_key)
  for _ = 1, LIMIT do
    local row = peek_after(lane_key, cursor)
    if not row then return end
    cursor = row[1]
    local e = entry_of(stage, lane, row[1], row[2])
    if e and not move then return end
    deliver_next(lane_key, PARKED)
    ack(stage, lane, row[1])
    if e then
      count_waiting(stage, lane, e.tokens, -1)
      enqueue(e.id, move, e.priority, e.tokens, e.blocks, e.v)
      moved = moved + 1
    else
      deleted = deleted + 1
    end
  end
end

local function living(role)
  return redis.call('ZCOUNT', key_alive(role), now_ms, '+inf') > 0
end
local to_decode = not living('prefill') and living('decode')

for _, l in ipairs(lanes) do
  local stage, lane, owner = l[1], l[2], l[3]
  local lane_key = key_lane(stage, lane)
  if redis.call('XLEN', lane_key) > 0 then
    last_delivered(lane_key)
    park_expired(stage, lane, lane_key)
    local move = nil
    if owner and tonumber(redis.call('ZSCORE', key_alive(stage), owner)) < now_ms then move = stage end
    if stage == 'prefill' and to_decode then move = 'decode' end
    visit_waiting(stage, lane, lane_key, move)
  end
end
for _, role in ipairs({'prefill', 'decode', 'api'}) do
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', key_alive(role), '-inf', now_ms - 2 * lease_ms, 'LIMIT', 0, LIMIT)) do
    local own = key_lane(role, '@' .. name)
    if redis.call('XLEN', own) == 0 then
      redis.call('DEL', own)
      redis.call('ZREM', key_alive(role), name)
    end
  end
end
return {expired, parked, dead, moved, deleted}
