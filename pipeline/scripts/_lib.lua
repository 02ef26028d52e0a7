-- Shared by the scripts that change a request's state. Needs the key prelude. All state changes of a request are here.
-- States: queued -> running -> queued ... -> done | failed | cancelled | expired | dead.
local function now_us()
  local t = redis.call('TIME')
  return t[1] .. string.format('%06d', t[2])
end

local function is_ended(state)
  return state ~= 'queued' and state ~= 'running'
end

local function count(field, by)
  redis.call('HINCRBY', key_counters(), field, by)
end

-- Changes nothing. As a script's first write it is one that Redis allows when memory is full, and lets those behind it through.
local function allow_writes()
  redis.call('HDEL', key_counters(), '')
end

-- Says what happened to a task or a worker to whoever listens now; nobody may. Called behind a script's writes.
local function event(kind, id, stage, lane, worker, detail)
  redis.call('PUBLISH', key_events(), cmsgpack.pack({kind, id, stage, lane or '', worker or '', tonumber(now_us()), detail or ''}))
end

local EVENT_OF = {done = 'task-succeeded', failed = 'task-failed', cancelled = 'task-revoked', expired = 'task-expired',
  dead = 'task-rejected'}

-- A task joins (by = 1) or leaves (by = -1) those that wait on a lane.
local function count_waiting(stage, lane, tokens, by)
  count('waiting:' .. stage .. ':' .. lane, by)
  count('tokens:' .. stage .. ':' .. lane, by * tonumber(tokens) + 0) -- of no tokens: -0 is no integer to Redis
end

-- A task begins (by = 1) or ends (by = -1) to run. Decode runs choices, the other stages tasks. By priority: a worker's own lane is none.
local function count_running(stage, priority, n, by)
  count('running:' .. stage .. ':' .. priority, by * (stage == 'decode' and tonumber(n) or 1))
end

-- Of those that wait: one that was admitted for later (by = 1), or no longer is one (by = -1). Nobody may claim it yet.
local function count_later(stage, lane, tokens, by)
  count('later:' .. stage .. ':' .. lane, by)
  count('later_tokens:' .. stage .. ':' .. lane, by * tonumber(tokens) + 0)
end

-- A new request may be claimed from now on. Prompt tokens that decode computes for want of a prefill worker are demand for one.
local function arrive(stage, priority, tokens)
  count('arrived:' .. stage .. ':' .. priority, 1)
  count('arrived_tokens:' .. stage .. ':' .. priority, tonumber(tokens))
  if stage == 'decode' and redis.call('ZCOUNT', key_alive('prefill'), math.floor(tonumber(now_us()) / 1000), '+inf') == 0 then
    count('local:' .. priority, tonumber(tokens))
  end
end

local function ring(stage)
  redis.call('PUBLISH', key_bell(stage), cmsgpack.pack({'bell', stage}))
end

-- last-delivered-id of the lane's group; creates the group at 0 where it is missing (after Redis lost its data, too)
local function last_delivered(lane_key)
  local groups = redis.call('XINFO', 'GROUPS', lane_key)
  for _, group in ipairs(groups) do
    local g = {}
    for i = 1, #group, 2 do g[group[i]] = group[i + 1] end
    if g['name'] == GROUP then return g['last-delivered-id'] end
  end
  redis.call('XGROUP', 'CREATE', lane_key, GROUP, '0')
  return '0-0'
end

-- Adds a task at the tail of a lane and makes it the request's current one. `blocks` is read by workers before 0.1.0 only.
local function enqueue(id, stage, lane, tokens, blocks, version)
  -- a worker's own lane lives only as long as the worker is known: sweeps would never visit it afterwards
  if string.sub(lane, 1, 1) == '@' and not redis.call('ZSCORE', key_alive(stage), string.sub(lane, 2)) then
    lane = redis.call('HGET', key_req(id), 'priority')
  end
  local entry = redis.call('XADD', key_lane(stage, lane), '*', 'id', id, 'tokens', tokens, 'blocks', blocks, 'v', version)
  redis.call('HSET', key_req(id), 'state', 'queued', 'stage', stage, 'lane', lane, 'entry', entry, 'owner', '')
  count_waiting(stage, lane, tokens, 1)
  ring(stage)
  return entry
end

-- The request that the first twenty arguments of admit and restore describe. `holder`: the API key whose slot it takes, or ''.
local function request_of(a)
  return {id = a[1], stage = a[2], lane = a[3], body = a[4], tokens = a[5], blocks = a[6], n = a[7], version = a[8], api = a[9],
    deadline_s = a[10], ttl = a[11], dead_ttl = a[12], priority = a[13], idem = a[14], linger = a[15], delay_ms = tonumber(a[16]),
    replay_of = a[17], digest = a[18], notify = a[19], holder = a[20]}
end

-- Stores a request and lets it wait: on its lane, or until its delay is over.
local function store(r, epoch)
  local now = now_us()
  local now_ms = math.floor(tonumber(now) / 1000)
  local deadline = string.format('%.0f', now_ms + r.delay_ms + tonumber(r.deadline_s) * 1000)
  redis.call('HSET', key_req(r.id), 'body', r.body, 'epoch', epoch, 'api', r.api, 'tokens', r.tokens, 'blocks', r.blocks,
    'n', r.n, 'v', r.version, 'deadline', deadline, 'ttl', r.ttl, 'dead_ttl', r.dead_ttl, 'idem', r.idem, 'attempts', 0,
    'priority', r.priority, 't_admitted', now, 'linger', r.linger, 'digest', r.digest)
  if r.notify ~= '' then redis.call('HSET', key_req(r.id), 'notify', r.notify) end
  if r.holder ~= '' then
    redis.call('HSET', key_req(r.id), 'holder', r.holder)
    redis.call('SADD', key_held(r.holder), r.id)
  end
  if r.replay_of ~= '' then redis.call('HSET', key_req(r.id), 'replay_of', r.replay_of) end
  redis.call('ZADD', key_deadlines(), deadline, r.id)
  if r.linger ~= '' then redis.call('SADD', key_served(r.api), r.id) end
  if r.delay_ms > 0 then -- it counts as waiting, but stands on no lane yet
    redis.call('HSET', key_req(r.id), 'state', 'queued', 'stage', r.stage, 'lane', r.lane, 'entry', '', 'owner', '')
    count_waiting(r.stage, r.lane, r.tokens, 1)
    count_later(r.stage, r.lane, r.tokens, 1)
    redis.call('ZADD', key_delayed(), string.format('%.0f', now_ms + r.delay_ms), r.id)
  else
    enqueue(r.id, r.stage, r.lane, r.tokens, r.blocks, r.version)
  end
end

-- Ends a delivery for good. Only delivered entries are deleted, so the group's lag stays true.
local function ack(stage, lane, entry)
  redis.call('XACK', key_lane(stage, lane), GROUP, entry)
  redis.call('XDEL', key_lane(stage, lane), entry)
end

-- Whether some worker (or PARKED, DELAYED) has been given the entry: then it may be deleted, without a hole in the group's lag.
local function is_delivered(lane_key, entry)
  last_delivered(lane_key)
  return #redis.call('XPENDING', lane_key, GROUP, entry, entry, 1) > 0
end

local function publish(id, api, watch, frame)
  if api and api ~= '' then redis.call('PUBLISH', key_bus(api), frame) end
  if watch then redis.call('PUBLISH', key_tok(id), frame) end
end

local function free_handle(id, handle_id, handle_owner)
  if not handle_id or handle_id == '' then return end
  redis.call('HDEL', key_req(id), 'handle', 'handle_id', 'handle_owner')
  redis.call('PUBLISH', key_ctl(handle_owner), cmsgpack.pack({'free', handle_id}))
end

-- Ends a request: the first caller wins, later ones get its answer {state, reason}. `by` is the worker that asks, or ''; `result`
-- what its task gave, or nil.
local function finish(id, state, reason, by, result)
  local req = key_req(id)
  local h = redis.call('HMGET', req, 'state', 'reason', 'stage', 'lane', 'entry', 'owner', 'epoch', 'api', 'watch',
    'handle_id', 'handle_owner', 'n', 'tokens', 'cached', 'ttl', 'idem', 'notify', 'holder', 'priority')
  if not h[1] then return {'gone', ''} end
  if is_ended(h[1]) then return {h[1], h[2]} end
  redis.call('ZREM', key_deadlines(), id) -- a first write that Redis allows when memory is full lets the rest through
  redis.call('ZREM', key_orphans(), id)
  redis.call('ZREM', key_delayed(), id)
  redis.call('SREM', key_served(h[8]), id)
  if h[18] then redis.call('SREM', key_held(h[18]), id) end
  if h[1] == 'running' then
    ack(h[3], h[4], h[5])
    count_running(h[3], h[19], h[12], -1)
  else
    count_waiting(h[3], h[4], h[13], -1)
    if h[5] == '' then count_later(h[3], h[4], h[13], -1) end
    -- an entry that nobody has been given stays: the next claim or sweep deletes it
    if h[5] ~= '' and is_delivered(key_lane(h[3], h[4]), h[5]) then ack(h[3], h[4], h[5]) end
  end
  if state == 'dead' then h[15] = redis.call('HGET', req, 'dead_ttl') or h[15] end -- as long as it can be replayed
  local completion = 0
  for choice = 0, tonumber(h[12]) - 1 do
    completion = completion + redis.call('STRLEN', key_log(id, choice)) / 4
    redis.call('EXPIRE', key_log(id, choice), h[15])
    redis.call('EXPIRE', key_probs(id, choice), h[15])
  end
  redis.call('EXPIRE', key_pprobs(id), h[15])
  redis.call('HSET', req, 'state', state, 'reason', reason, 't_ended', now_us(), 'completion', completion)
  if result and result ~= '' then redis.call('HSET', req, 'result', result) end
  local timeline = redis.call('HMGET', req, 't_admitted', 't_claimed_prefill', 't_handover', 't_claimed_decode', 't_fetched',
    't_first_token', 't_ended')
  for i = 1, 7 do timeline[i] = tonumber(timeline[i] or 0) end
  if h[6] ~= '' and h[6] ~= by then
    redis.call('PUBLISH', key_ctl(h[6]), cmsgpack.pack({'cancel', id, tonumber(h[7])}))
  end
  free_handle(id, h[10], h[11])
  publish(id, h[8] ~= '' and h[8] or h[17], h[9], cmsgpack.pack({{'e', id, state, reason, tonumber(h[13]), completion, tonumber(h[14] or 0), h[3],
    timeline}}))
  count('ended:' .. state, 1)
  if state == 'done' and (h[3] == 'prefill' or h[3] == 'decode') then
    count('answers', 1)
    count('answer_tokens', completion)
  end
  redis.call('EXPIRE', req, h[15])
  if h[16] and h[16] ~= '' then redis.call('EXPIRE', key_idem(h[16]), h[15]) end
  event(EVENT_OF[state], id, h[3], h[4], h[6], reason)
  return {state, reason}
end

-- One record a token, all of one size: each stands where its token's index says, so writing it again changes nothing.
local function write_logprobs(id, choice, index, tokens, records)
  redis.call('SETRANGE', key_probs(id, choice), #records / (#tokens / 4) * index, records)
end

local function log_length(id, n)
  local total = 0
  for choice = 0, tonumber(n) - 1 do total = total + redis.call('STRLEN', key_log(id, choice)) end
  return total
end

-- Whether a choice has not ended yet, as far as Redis knows.
local function has_open_choice(id, n)
  for choice = 0, tonumber(n) - 1 do
    if redis.call('HEXISTS', key_req(id), 'fin:' .. choice) == 0 then return true end
  end
  return false
end

-- Takes a running task from its owner and parks it: it waits again, ahead of new ones; after `delay_ms` where there is one. A
-- delivery that made no progress counts as an attempt when `counts`; the last allowed one dead-letters the request. `suspect`:
-- 'always' or 'stuck' (when it made no progress): it may be what killed its engine, so it runs alone the next time.
local function park(id, counts, max_attempts, why, delay_ms, suspect)
  local req = key_req(id)
  local h = redis.call('HMGET', req, 'stage', 'lane', 'entry', 'tokens', 'n', 'claimed_length', 'owner', 'suspect', 'priority')
  local stage, lane, entry = h[1], h[2], h[3]
  redis.call('XCLAIM', key_lane(stage, lane), GROUP, delay_ms > 0 and DELAYED or PARKED, 0, entry, 'JUSTID')
  local is_stuck = log_length(id, h[5]) == tonumber(h[6])
  local attempts = 0
  if is_stuck then
    attempts = redis.call('HINCRBY', req, 'attempts', counts and 1 or 0)
  else
    redis.call('HSET', req, 'attempts', 0)
  end
  if attempts >= max_attempts then
    redis.call('XADD', key_dead(), 'MAXLEN', '~', 10000, '*', 'id', id, 'stage', stage, 'lane', lane, 'reason', why,
      'worker', h[7], 'attempts', attempts)
    finish(id, 'dead', why .. ' after ' .. attempts .. (attempts == 1 and ' attempt in ' or ' attempts in ') .. stage, '')
    return 'dead'
  end
  local has_engine = stage == 'prefill' or stage == 'decode' -- of others only the worker knows: it says 'always'
  local runs_alone = suspect == 'always' or (is_stuck and (h[8] == '1' or (has_engine and suspect == 'stuck')))
  redis.call('HSET', req, 'state', 'queued', 'owner', '', 'suspect', runs_alone and '1' or '')
  count_running(stage, h[9], h[5], -1)
  count_waiting(stage, lane, h[4], 1)
  event('task-retried', id, stage, lane, h[7], why)
  if delay_ms > 0 then
    redis.call('ZADD', key_delayed(), string.format('%.0f', tonumber(now_us()) / 1000 + delay_ms), id)
  else
    ring(stage)
  end
  return 'parked'
end

-- A process is gone for good: its name leaves the groups of all lanes of a stage where it holds nothing.
local function forget_consumer(stage, name)
  for _, lane in ipairs({'high', 'default', 'low'}) do
    local lane_key = key_lane(stage, lane)
    if redis.call('EXISTS', lane_key) == 1 then
      last_delivered(lane_key)
      if #redis.call('XPENDING', lane_key, GROUP, '-', '+', 1, name) == 0 then
        redis.call('XGROUP', 'DELCONSUMER', lane_key, GROUP, name)
      end
    end
  end
end

-- The request that runs by this entry of a lane, or nil when the entry is not what keeps it running.
local function running_by(lane, lane_key, entry)
  local row = redis.call('XRANGE', lane_key, entry, entry)[1]
  if not row then return nil end
  for i = 1, #row[2], 2 do
    if row[2][i] == 'id' then
      local h = redis.call('HMGET', key_req(row[2][i + 1]), 'state', 'entry', 'lane')
      return h[1] == 'running' and h[2] == entry and h[3] == lane and row[2][i + 1] or nil
    end
  end
end

-- What a lane's entry says, or nil when the request behind it no longer stands there (ended, moved on).
local function entry_of(lane_stage, lane, entry, fields)
  local e = {}
  for i = 1, #fields, 2 do e[fields[i]] = fields[i + 1] end
  if not e.id then return nil end
  local h = redis.call('HMGET', key_req(e.id), 'state', 'stage', 'lane', 'entry', 'deadline', 'priority', 'suspect',
    'n')
  if h[1] == 'queued' and h[2] == lane_stage and h[3] == lane and h[4] == entry then
    e.deadline, e.priority, e.is_suspect, e.n = tonumber(h[5]), h[6], h[7] == '1', tonumber(h[8])
    return e
  end
  return nil
end

local function peek_after(lane_key, last)
  return redis.call('XRANGE', lane_key, '(' .. last, '+', 'COUNT', 1)[1]
end

local function deliver_next(lane_key, consumer)
  redis.call('XREADGROUP', 'GROUP', GROUP, consumer, 'COUNT', 1, 'STREAMS', lane_key, '>')
end
