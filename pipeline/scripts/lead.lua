-- Who scales a pool: takes the lease or renews it, or gives it up.
-- KEYS: root
-- ARGV: holder, lease in ms (0 gives it up), a holder that is known to have ended or ''
-- Answers: '' when it is the caller's, or given up; else who holds it
-- Called twice: the lease is the caller's already.
local holder, lease_ms, ended = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local held = redis.call('GET', key_scaler())
if held and held ~= holder and held ~= ended then return held end
allow_writes()
if lease_ms > 0 then
  redis.call('SET', key_scaler(), holder, 'PX', lease_ms)
elseif held == holder then
  redis.call('DEL', key_scaler())
end
return ''
