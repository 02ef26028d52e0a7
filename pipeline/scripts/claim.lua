-- Gives a worker one task that it can start now, or nothing. Parked tasks of a lane go before new ones; entries of requests that
-- ended or moved on are deleted on the way; what does not fit is parked for others, and once it has waited for `overtake ms`
-- nothing overtakes it on this worker any more. A suspect (its last delivery ended in a dead engine) is for an idle worker only.
-- KEYS: root
-- ARGV: stage, worker, nonce of this claim, tasks that it holds, total blocks, tokens of a block, newest wire version, overtake ms,
--       guard ms, then for each look at a lane: lane, free blocks for it, and which tasks: 'aged' (what has waited for `guard ms`; nothing
--       is held back for them), 'spare' (what has waited for SPARE_MS, so that no worker starts it at once) or '' (all)
-- Answers: {} | {id, epoch, body, stage, lane, handle, attempts, deadline ms, api, prompt tokens, suspect ('1' or ''), priority,
--          (log, finish reason) of each choice ...}
-- Called twice: one nonce gives the same task again while it is still this worker's at that epoch, else {}.
local stage, worker, nonce = ARGV[1], ARGV[2], ARGV[3]
local held, total, block_size, newest = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local overtake_ms, guard_ms = tonumber(ARGV[8]), tonumber(ARGV[9])
local PASSED = 16 -- tasks of a lane that may be passed over because they do not fit now
local SPARE_MS = 20 -- an idle worker has claimed a task long before
local LOOKED_AT = 256 -- parked, and as many new, entries of a lane that are looked at; the next claim goes on behind them

local function describe(id)
  local h = redis.call('HMGET', key_req(id), 'epoch', 'body', 'stage', 'lane', 'handle', 'attempts', 'deadline', 'api', 'n', 'tokens',
    'suspect', 'priority')
  local answer = {id, h[1], h[2], h[3], h[4], h[5] or '', h[6], h[7], h[8], h[10], h[11] or '', h[12] or ''}
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
  local h = redis.call('HMGET', key_req(id), 'n', 'priority')
  redis.call('HSET', key_req(id), 'state', 'running', 'owner', worker, 't_claimed_' .. stage, now, 'claimed_length', log_length(id, h[1]))
  count_waiting(stage, lane, tokens, -1)
  count_running(stage, h[2], h[1], 1)
  count('claimed:' .. stage .. ':' .. lane, 1)
  redis.call('HSET', key_worker(worker), 'nonce', nonce, 'claimed', id, 'claimed_epoch', epoch)
  event('task-started', id, stage, lane, worker, 'epoch ' .. epoch)
  return describe(id)
end

-- Blocks of this worker that a task needs to start: its prompt's, and room for the next token of each choice.
local function needed(e)
  return math.ceil(tonumber(e.tokens) / block_size) + e.n
end

-- 'gone', 'late', 'take', 'never' (not on this worker), 'pass' (leave it for others), 'hold' (and let nothing overtake it here) or
-- 'young' (not aged enough for this look, so nothing behind it is)
local function judge(e, entry, look)
  if not e then return 'gone' end
  if e.deadline <= now_ms then return 'late' end
  local waited_ms = now_ms - tonumber(string.match(entry, '^%d+'))
  if waited_ms < look.least_ms then return 'young' end
  if tonumber(e.v) > newest or needed(e) > total then return 'never' end
  if e.is_suspect and held > 0 then -- an idle worker takes it; only after a while this one becomes idle for it
    return waited_ms > overtake_ms + guard_ms and not look.is_aged and 'hold' or 'never'
  end
  if needed(e) <= look.free then return 'take' end
  if waited_ms > overtake_ms and not look.is_aged then return 'hold' end
  return 'pass'
end

local function expire(e)
  finish(e.id, 'expired', 'deadline passed while waiting for ' .. stage, '')
end

local function parked_after(lane_key, from)
  return redis.call('XPENDING', lane_key, GROUP, from, '+', 16, PARKED)
end

-- Looks at the parked tasks of a lane. Returns the claimed task, or 'hold', or nothing.
local function look_at_parked(look)
  local lane, lane_key = look.lane, look.lane_key
  local mark = 'parked:' .. lane -- where the last claim stopped, when there were more than it could look at
  local from = redis.call('HGET', key_worker(worker), mark) or '-'
  local parked, looked_at = parked_after(lane_key, from), 0
  while #parked > 0 and looked_at < LOOKED_AT do
    local entry = table.remove(parked, 1)[1]
    looked_at = looked_at + 1
    local row = redis.call('XRANGE', lane_key, entry, entry)[1]
    local e = row and entry_of(stage, lane, entry, row[2])
    local verdict = judge(e, entry, look)
    if verdict == 'take' then
      redis.call('XCLAIM', lane_key, GROUP, worker, 0, entry, 'JUSTID')
      return take(e.id, lane, e.tokens)
    elseif verdict == 'gone' then
      ack(stage, lane, entry)
    elseif verdict == 'late' then
      expire(e)
    elseif verdict == 'hold' then
      return 'hold'
    elseif verdict == 'young' then
      return
    elseif verdict == 'pass' then
      look.passed = look.passed + 1
    end
    from = '(' .. entry
    if #parked == 0 then parked = parked_after(lane_key, from) end
  end
  if #parked > 0 then
    redis.call('HSET', key_worker(worker), mark, from)
  else
    redis.call('HDEL', key_worker(worker), mark)
  end
end

-- Looks at the tasks of a lane that nobody has been given yet; those passed over are parked. Returns as above.
local function look_at_new(look)
  local lane, lane_key = look.lane, look.lane_key
  local cursor = last_delivered(lane_key)
  for _ = 1, LOOKED_AT do
    local row = peek_after(lane_key, cursor)
    if not row then return end
    local e = entry_of(stage, lane, row[1], row[2])
    local verdict = judge(e, row[1], look)
    cursor = row[1]
    if verdict == 'take' then
      deliver_next(lane_key, worker)
      return take(e.id, lane, e.tokens)
    elseif verdict == 'gone' or verdict == 'late' then
      if e then expire(e) end
      deliver_next(lane_key, PARKED)
      ack(stage, lane, row[1])
    elseif verdict == 'hold' then
      return 'hold'
    elseif verdict == 'young' then
      return
    else
      if verdict == 'pass' then
        if look.passed >= PASSED then return end
        look.passed = look.passed + 1
      end
      deliver_next(lane_key, PARKED)
    end
  end
end

for i = 10, #ARGV, 3 do
  local look = {lane = ARGV[i], lane_key = key_lane(stage, ARGV[i]), free = tonumber(ARGV[i + 1]), is_aged = ARGV[i + 2] == 'aged',
    least_ms = ({aged = guard_ms, spare = SPARE_MS})[ARGV[i + 2]] or 0, passed = 0}
  if redis.call('XLEN', look.lane_key) > 0 then
    last_delivered(look.lane_key) -- makes the group where it is missing
    local found = look_at_parked(look) or look_at_new(look)
    if found == 'hold' then return {} end
    if found then return found end
  end
end
return {}
