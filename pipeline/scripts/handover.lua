-- Ends prefill's task and adds decode's in one step: before it the task is prefill's, after it decode's, nothing in between.
-- First tokens go to the log and onto the bus. Where every choice ended with its first token the request ends here.
-- KEYS: root
-- ARGV: id, epoch, worker, decode lane or '' (the request's priority), handle or '', handle id, handle owner, cached tokens,
--       then for each first output: choice, index, packed tokens, finish reason or '', frame item,
--       records of log probabilities or ''
-- Answers: {'ok', 'decode' | 'done'} | {'fenced'} | {'ended', state}
-- Called twice: the epoch of the hand-over is kept, so the answer is the first one again.
local id, epoch, worker, lane = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local handle, handle_id, handle_owner, cached = ARGV[5], ARGV[6], ARGV[7], ARGV[8]
local req = key_req(id)
local h = redis.call('HMGET', req, 'state', 'epoch', 'owner', 'stage', 'lane', 'entry', 'api', 'watch', 'n', 'tokens', 'blocks', 'v',
  'handover_epoch', 'handover_to', 'deadline', 'priority')
if not h[1] then return {'ended', 'gone'} end
if h[13] == epoch then return {'ok', h[14]} end
if is_ended(h[1]) then return {'ended', h[1]} end
if h[1] ~= 'running' or h[2] ~= epoch or h[3] ~= worker or h[4] ~= 'prefill' then return {'fenced'} end
local now = now_us()
if tonumber(h[15]) <= tonumber(now) / 1000 then return {'ended', finish(id, 'expired', 'deadline passed in prefill', worker)[1]} end

ack('prefill', h[5], h[6])
local items, first = {}, false
for i = 9, #ARGV, 6 do
  local choice, index, tokens, reason = ARGV[i], tonumber(ARGV[i + 1]), ARGV[i + 2], ARGV[i + 3]
  redis.call('SETRANGE', key_log(id, choice), 4 * index, tokens)
  if ARGV[i + 5] ~= '' then write_logprobs(id, choice, index, tokens, ARGV[i + 5]) end
  if reason ~= '' then redis.call('HSET', req, 'fin:' .. choice, reason) end
  if index == 0 then first = true end
  items[#items + 1] = ARGV[i + 4]
end
redis.call('HSET', req, 't_handover', now, 'handover_epoch', epoch, 'cached', cached)
if first then redis.call('HSETNX', req, 't_first_token', now) end
if #items > 0 then
  publish(id, h[7], h[8], string.char(0xdc, math.floor(#items / 256), #items % 256) .. table.concat(items))
end
count('handovers', 1)
if not has_open_choice(id, h[9]) then
  redis.call('HSET', req, 'handover_to', 'done')
  finish(id, 'done', '', worker)
  return {'ok', 'done'}
end
redis.call('HSET', req, 'handover_to', 'decode', 'attempts', 0, 'suspect', '')
if handle ~= '' then redis.call('HSET', req, 'handle', handle, 'handle_id', handle_id, 'handle_owner', handle_owner) end
event('task-handed-over', id, 'prefill', h[5], worker, '')
count_running('prefill', h[16], h[9], -1)
enqueue(id, 'decode', lane ~= '' and lane or h[16], h[10], h[11], h[12])
return {'ok', 'decode'}
