-- Puts right what nobody else will: ends requests past their deadline and those that nobody reads any more, lets delayed tasks wait
-- on their lanes again, parks tasks whose lease ran out, forgets processes that stopped renewing, empties their own lanes, moves
-- waiting prefill tasks to decode while no prefill worker lives, deletes entries of ended requests. Bounded: what is left is for
-- the next sweep. When nobody could sweep for a while (Redis was away), nobody could renew either: for one lease nothing is
-- taken from anybody.
-- KEYS: root
-- ARGV: sweeper, interval ms, lease ms, max attempts
-- Answers: {} when another one swept within the interval | {expired, parked, dead, moved, deleted, cancelled, resumed, held back}
-- Called twice: within the interval the second call does nothing.
local sweeper, interval_ms, lease_ms, max_attempts = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local LIMIT = 500
redis.call('ZREMRANGEBYSCORE', key_alive('prefill'), '-inf', '(0') -- removes nothing; a first write allowed when memory is full
if not redis.call('SET', key_sweep(), sweeper, 'NX', 'PX', interval_ms) then return {} end
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local expired, parked, dead, moved, deleted, cancelled, resumed = 0, 0, 0, 0, 0, 0, 0

-- Whether leases count: not for one lease after a gap in the sweeps.
local function leases_count()
  local seen = redis.call('HMGET', key_swept(), 'last', 'hold_until')
  local last, hold_until = tonumber(seen[1]), tonumber(seen[2] or 0)
  if last and now_ms - last > math.max(4 * interval_ms, lease_ms / 4) then
    hold_until = now_ms + lease_ms
    count('lease_holds', 1)
  end
  redis.call('HSET', key_swept(), 'last', string.format('%.0f', now_ms), 'hold_until', string.format('%.0f', hold_until))
  return now_ms >= hold_until
end
local may_reclaim = leases_count()

for _, id in ipairs(redis.call('ZRANGEBYSCORE', key_deadlines(), '-inf', now_ms, 'LIMIT', 0, LIMIT)) do
  local h = redis.call('HMGET', key_req(id), 'stage', 'state')
  local doing = h[2] == 'queued' and 'while waiting for ' or 'in '
  finish(id, 'expired', 'deadline passed ' .. doing .. (h[1] or 'waiting'), '')
  redis.call('ZREM', key_deadlines(), id)
  expired = expired + 1
end

for _, id in ipairs(redis.call('ZRANGEBYSCORE', key_orphans(), '-inf', now_ms, 'LIMIT', 0, LIMIT)) do
  finish(id, 'cancelled', 'nobody reads it any more', '')
  redis.call('ZREM', key_orphans(), id)
  cancelled = cancelled + 1
end

for _, id in ipairs(redis.call('ZRANGEBYSCORE', key_delayed(), '-inf', now_ms, 'LIMIT', 0, LIMIT)) do
  redis.call('ZREM', key_delayed(), id)
  local h = redis.call('HMGET', key_req(id), 'state', 'stage', 'lane', 'entry', 'tokens', 'blocks', 'v', 'priority')
  if h[1] == 'queued' then
    if h[4] == '' then -- it was admitted for later
      count_waiting(h[2], h[3], h[5], -1)
      count_later(h[2], h[3], h[5], -1)
      arrive(h[2], h[8], h[5])
      enqueue(id, h[2], h[3], h[5], h[6], h[7])
    else -- it keeps the place that it had before its retry
      redis.call('XCLAIM', key_lane(h[2], h[3]), GROUP, PARKED, 0, h[4], 'JUSTID')
      ring(h[2])
    end
    resumed = resumed + 1
  end
end

local stages = redis.call('SMEMBERS', key_stages())
for _, stage in ipairs({'prefill', 'decode'}) do
  if redis.call('SADD', key_stages(), stage) == 1 then stages[#stages + 1] = stage end
end

local lanes, runs = {}, {} -- runs: stages in which some task is in a worker's hands
for _, stage in ipairs(stages) do
  for _, lane in ipairs({'high', 'default', 'low'}) do lanes[#lanes + 1] = {stage, lane} end
  for _, name in ipairs(redis.call('ZRANGE', key_alive(stage), 0, -1)) do lanes[#lanes + 1] = {stage, '@' .. name, name} end
end

-- Each worker's own, so that many parked tasks never hide a lease that ran out.
local function park_expired(stage, lane, lane_key)
  for _, row in ipairs(redis.call('XINFO', 'CONSUMERS', lane_key, GROUP)) do
    local c = {}
    for i = 1, #row, 2 do c[row[i]] = row[i + 1] end
    if c.pending > 0 and c.name ~= PARKED and c.name ~= DELAYED then
      runs[stage] = true
      local own_ms = tonumber(redis.call('HGET', key_worker(c.name), 'lease') or 0) -- settings of processes may differ
      local idle_ms = math.max(lease_ms, own_ms)
      for _, p in ipairs(redis.call('XPENDING', lane_key, GROUP, 'IDLE', idle_ms, '-', '+', LIMIT, c.name)) do
        local id = running_by(lane, lane_key, p[1])
        if not id then
          ack(stage, lane, p[1])
          deleted = deleted + 1
        elseif park(id, true, max_attempts, 'lease lost by ' .. c.name, 0, 'stuck') == 'dead' then
          dead = dead + 1
        else
          parked = parked + 1
        end
      end
    end
  end
end

-- A living task that waits goes to another stage, or to its priority's lane of the same one.
local function move_to(stage, from, lane, e)
  count_waiting(from, lane, e.tokens, -1)
  enqueue(e.id, stage, e.priority, e.tokens, e.blocks, e.v)
  moved = moved + 1
end

-- Visits what waits on a lane, parked first: entries that keep nothing waiting are deleted, living tasks moved where `move` says so.
local function visit_waiting(stage, lane, lane_key, move)
  for _, p in ipairs(redis.call('XPENDING', lane_key, GROUP, '-', '+', LIMIT, PARKED)) do
    local row = redis.call('XRANGE', lane_key, p[1], p[1])[1]
    local e = row and entry_of(stage, lane, p[1], row[2])
    if not e then
      ack(stage, lane, p[1])
      deleted = deleted + 1
    elseif move then
      ack(stage, lane, p[1])
      move_to(move, stage, lane, e)
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
      move_to(move, stage, lane, e)
    else
      deleted = deleted + 1
    end
  end
end

local function living(role)
  return redis.call('ZCOUNT', key_alive(role), now_ms, '+inf') > 0
end
local to_decode = may_reclaim and not living('prefill') and living('decode')

for _, l in ipairs(lanes) do
  local stage, lane, owner = l[1], l[2], l[3]
  local lane_key = key_lane(stage, lane)
  if redis.call('XLEN', lane_key) > 0 then
    last_delivered(lane_key)
    if may_reclaim then park_expired(stage, lane, lane_key) end
    local move = nil
    if may_reclaim and owner and tonumber(redis.call('ZSCORE', key_alive(stage), owner)) < now_ms then move = stage end
    if stage == 'prefill' and to_decode then move = 'decode' end
    visit_waiting(stage, lane, lane_key, move)
  end
end

-- What a process of the version before did not count is put right here: where nothing runs, nothing is counted as running, and those
-- that were admitted for later are counted anew, as long as they are few.
local function set_count(field, value)
  if tonumber(redis.call('HGET', key_counters(), field) or 0) ~= value then redis.call('HSET', key_counters(), field, value) end
end

local function count_delayed()
  local found = {}
  for _, id in ipairs(redis.call('ZRANGE', key_delayed(), 0, -1)) do
    local h = redis.call('HMGET', key_req(id), 'state', 'stage', 'lane', 'entry', 'tokens')
    if h[1] == 'queued' and h[4] == '' then
      local place = h[2] .. ':' .. h[3]
      found['later:' .. place] = (found['later:' .. place] or 0) + 1
      found['later_tokens:' .. place] = (found['later_tokens:' .. place] or 0) + tonumber(h[5])
    end
  end
  return found
end

local later = redis.call('ZCARD', key_delayed()) <= LIMIT and count_delayed() or nil
for _, stage in ipairs(stages) do
  for _, lane in ipairs({'high', 'default', 'low'}) do
    local place = stage .. ':' .. lane
    if may_reclaim and not runs[stage] then set_count('running:' .. place, 0) end
    for _, name in ipairs(later and {'later:', 'later_tokens:'} or {}) do set_count(name .. place, later[name .. place] or 0) end
  end
end

-- What an API process served and nobody may read any more is an orphan from now on, for as long as each request says.
local function orphan_served(api)
  for _, id in ipairs(redis.call('SRANDMEMBER', key_served(api), LIMIT)) do
    redis.call('SREM', key_served(api), id)
    local h = redis.call('HMGET', key_req(id), 'state', 'linger')
    if h[1] and not is_ended(h[1]) then
      redis.call('ZADD', key_orphans(), 'NX', string.format('%.0f', now_ms + tonumber(h[2] or 0)), id)
    end
  end
  return redis.call('SCARD', key_served(api)) == 0
end

local function forget(role, name)
  local has_left = tonumber(redis.call('ZSCORE', key_alive(role), name)) == 0 -- or was evicted: that was said then
  redis.call('ZREM', key_alive(role), name)
  if not has_left then event('worker-offline', '', role, '', name, 'lost') end
end

if may_reclaim then
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', key_alive('api'), '-inf', now_ms, 'LIMIT', 0, LIMIT)) do
    if orphan_served(name) then forget('api', name) end
  end
  for _, stage in ipairs(stages) do
    for _, name in ipairs(redis.call('ZRANGEBYSCORE', key_alive(stage), '-inf', now_ms - 2 * lease_ms, 'LIMIT', 0, LIMIT)) do
      local own = key_lane(stage, '@' .. name)
      if redis.call('XLEN', own) == 0 then
        redis.call('DEL', own)
        forget(stage, name)
        forget_consumer(stage, name)
      end
    end
  end
end
return {expired, parked, dead, moved, deleted, cancelled, resumed, may_reclaim and 0 or 1}
