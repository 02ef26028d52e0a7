-- Forgets a file. Its bytes are removed by who calls this, afterwards.
-- KEYS: root of files
-- ARGV: id, owner, purpose
-- Answers: 1, whether or not it was known
-- Called twice: nothing is left to forget.
local id, owner, purpose = ARGV[1], ARGV[2], ARGV[3]
redis.call('ZREM', root .. 'list:' .. owner .. ':', id)
redis.call('ZREM', root .. 'list:' .. owner .. ':' .. purpose, id)
redis.call('ZREM', root .. 'expiries', id)
redis.call('DEL', root .. 'file:' .. id)
return 1
