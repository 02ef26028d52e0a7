-- Writes the tokens of one engine step into the logs and publishes those accepted as one frame. One call a step and API process.
-- KEYS: root
-- ARGV: api, worker, then for each item: id, epoch, choice, index, packed tokens, finish reason or '', frame item,
--       records of log probabilities or ''
-- Answers: one number an item: 0 accepted, 1 fenced (another delivery owns it), 2 ended, 3 gap (its index is beyond the log)
-- Called twice: SETRANGE at the item's own offset changes nothing, readers drop what they have by (choice, index).
allow_writes()
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local answers, items, count_items = {}, {}, 0
for i = 3, #ARGV, 8 do
  local id, index = ARGV[i], tonumber(ARGV[i + 3])
  local req = root .. 'req:' .. id
  local h = redis.call('HMGET', req, 'epoch', 'state', 'watch', 'deadline', 'owner')
  local answer = 0
  if h[1] ~= ARGV[i + 1] or h[2] ~= 'running' or h[5] ~= ARGV[2] then -- an epoch may come twice where Redis lost its end
    answer = (h[2] and not is_ended(h[2])) and 1 or 2
  elseif tonumber(h[4]) <= now_ms then
    finish(id, 'expired', 'deadline passed in ' .. redis.call('HGET', req, 'stage'), '')
    answer = 2
  else
    local log = root .. 'log:' .. id .. ':' .. ARGV[i + 2]
    if redis.call('STRLEN', log) < 4 * index then
      answer = 3
    else
      redis.call('SETRANGE', log, 4 * index, ARGV[i + 4])
      if ARGV[i + 7] ~= '' then write_logprobs(id, ARGV[i + 2], index, ARGV[i + 4], ARGV[i + 7]) end
      if ARGV[i + 5] ~= '' then redis.call('HSET', req, 'fin:' .. ARGV[i + 2], ARGV[i + 5]) end
      if index == 0 then redis.call('HSETNX', req, 't_first_token', time[1] .. string.format('%06d', time[2])) end
      count_items = count_items + 1
      items[count_items] = ARGV[i + 6]
      if h[3] then redis.call('PUBLISH', root .. 'tok:' .. id, string.char(0x91) .. ARGV[i + 6]) end
    end
  end
  answers[#answers + 1] = answer
end
if count_items > 0 and ARGV[1] ~= '' then
  redis.call('PUBLISH', root .. 'bus:' .. ARGV[1],
    string.char(0xdc, math.floor(count_items / 256), count_items % 256) .. table.concat(items))
end
return answers
