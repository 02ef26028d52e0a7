-- Makes a file known whose bytes are all there. Not of a pool: its root is that of all files.
-- KEYS: root of files
-- ARGV: id, owner, purpose, when it expires in s (0: never), then its fields and their values in turn
-- Answers: 1
-- Called twice: the same is written again.
local id, owner, purpose, expires = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
redis.call('HSET', root .. 'file:' .. id, unpack(ARGV, 5))
redis.call('ZADD', root .. 'list:' .. owner .. ':', 0, id)
redis.call('ZADD', root .. 'list:' .. owner .. ':' .. purpose, 0, id)
if expires ~= '0' then redis.call('ZADD', root .. 'expiries', expires, id) end
return 1
