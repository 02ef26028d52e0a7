-- Gives a worker one task that it can start now, or nothing. Parked tasks of a lane go before new ones; entries of requests that
-- ended or moved on are deleted on the way; what does not fit is parked for others, and once it has waited for `overtake ms`
-- nothing overtakes it on this worker any more.
-- KEYS: root
-- ARGV: stage, worker, nonce of this claim, free blocks, total blocks, newest wire version, overtake ms, lane ...
-- Answers: {} | {id, epoch, body, stage, lane, handle, attempts, deadline ms, api, prompt tokens, (log, finish reason) of each choice ...}
-- Called twice: one nonce gives the same task again while it is still this worker's at that epoch, else {}.
local stage, worker, nonce = ARGV[1], ARGV[2], ARGV[3]
local free, total, newest, overtake_ms = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local PASSED = 16 -- tasks of a lane that may be passed over because they do not fit now
local LOOKED_AT = 256 -- entries of a lane that are looked at

local function describe(id)
  local h = redis.call('HMGET', key_req(id), 'epoch', 'body', 'stage', 'lane', 'handle', 'attempts', 'deadline', 'api', 'n', 'tokens')
  local answer = {id, h[1], h[2], h[3], h[4], h[5] or '', h[6], h[7], h[8], h[10]}
  for choice = 0, tonumber(h[9]) - 1 do
    answer[#answer + 1] = redis.call('GET', key_log(id, choice)) or ''
    answer[#answer + 1] = redis.call('HGET', key_req(id), 'fin:' .. choice) or ''
  end
  return answer
end

local last = redis.call('HMGET', key_worker(worker), 'nonce', 'claimed', 'claimed_epoch')
if last[1] == nonce then
  local h = redis.call('HMGET', key_req(last[2]), 'epoch', 'state', 'owner')
  if h[1] == last[3] and h[2] == 'running' and h[3] == worker then return describe(last[2]) end
  return {}
end

allow_writes()
local now = now_us()
local now_ms = math.floor(tonumber(now) / 1000)

local function take(id, lane, tokens)
  local epoch = redis.call('HINCRBY', key_req(id), 'epoch', 1)
  local n = redis.call('HGET', key_req(id), 'n')
  redis.call('HSET', key_req(id), 'state', 'running', 'owner', worker, 't_claimed_' .. stage, now, 'claimed_length', log_length(id, n))
  count_waiting(stage, lane, tokens, -1)
  count('claimed:' .. stage .. ':' .. lane, 1)
  redis.call('HSET', key_worker(worker), 'nonce', nonce, 'claimed', id, 'claimed_epoch', epoch)
  event('task-started', id, stage, lane, worker, 'epoch ' .. epoch)
  return describe(id)
end

-- 'gone', 'late', 'take', 'never' (not on this worker), 'pass' (leave it for others) or 'hold' (and let nothing overtake it here)
local function judge(e, entry)
  if not e then return 'gone' end
  if e.deadline <= now_ms then return 'late' end
  if tonumber(e.v) > newest or tonumber(e.blocks) > total then return 'never' end
  if tonumber(e.blocks) <= free then return 'take' end
  local added_ms = tonumber(string.match(entry, '^%d+'))
  if now_ms - added_ms > overtake_ms then return 'hold' end
  return 'pass'
end

local function parked_after(lane_key, from)
  return redis.call('XPENDING', lane_key, GROUP, from, '+', 16, PARKED)
end

for i = 8, #ARGV do
  local lane = ARGV[i]
  local lane_key = key_lane(stage, lane)
  if redis.call('XLEN', lane_key) > 0 then
    local cursor = last_delivered(lane_key)
    local looked_at, passed, parked = 0, 0, parked_after(lane_key, '-')
    while #parked > 0 and looked_at < LOOKED_AT do
      local p = table.remove(parked, 1)
      looked_at = looked_at + 1
      local row = redis.call('XRANGE', lane_key, p[1], p[1])[1]
      local e = row and entry_of(stage, lane, p[1], row[2])
      local verdict = judge(e, p[1])
      if verdict == 'take' then
        redis.call('XCLAIM', lane_key, GROUP, worker, 0, p[1], 'JUSTID')
        return take(e.id, lane, e.tokens)
      elseif verdict == 'gone' then
        ack(stage, lane, p[1])
      elseif verdict == 'late' then
        finish(e.id, 'expired', 'deadline passed while waiting for ' .. stage, '')
        ack(stage, lane, p[1])
      elseif verdict == 'hold' then
        return {}
      elseif verdict == 'pass' then
        passed = passed + 1
      end
      if #parked == 0 then parked = parked_after(lane_key, '(' .. p[1]) end
    end
    for _ = looked_at + 1, LOOKED_AT do
      local row = peek_after(lane_key, cursor)
      if not row then break end
      local e = entry_of(stage, lane, row[1], row[2])
      local verdict = judge(e, row[1])
      cursor = row[1]
      if verdict == 'take' then
        deliver_next(lane_key, worker)
        return take(e.id, lane, e.tokens)
      elseif verdict == 'gone' then
        deliver_next(lane_key, PARKED)
        ack(stage, lane, row[1])
      elseif verdict == 'late' then
        finish(e.id, 'expired', 'deadline passed while waiting for ' .. stage, '')
        deliver_next(lane_key, PARKED)
        ack(stage, lane, row[1])
      elseif verdict == 'hold' then
        return {}
      elseif verdict == 'never' then
        deliver_next(lane_key, PARKED)
      elseif passed >= PASSED then
        break
      else
        deliver_next(lane_key, PARKED)
        passed = passed + 1
      end
    end
  end
end
return {}
