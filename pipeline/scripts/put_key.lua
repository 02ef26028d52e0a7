-- Keeps an API key and says that something has changed. Not of a pool: its root is that of the keys of all pools.
-- KEYS: root of API keys
-- ARGV: digest, the key as msgpack
-- Answers: when it was changed, in us: never what it was before, also after Redis has lost everything
-- Called twice: the same key is kept again, under a later time.
redis.call('HSET', root .. 'all', ARGV[1], ARGV[2])
local changed = now_us()
redis.call('SET', root .. 'version', changed)
return changed
