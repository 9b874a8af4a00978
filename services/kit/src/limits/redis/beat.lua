-- Says that a gateway is there, and counts those that are.
-- KEYS: the gateways, as a sorted set by when they were last seen. ARGV: the gateway, and how long one is remembered.
-- Answers: how many there are, and how many come before this one.
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local key, gateway, memory = KEYS[1], ARGV[1], tonumber(ARGV[2])
redis.call('ZADD', key, string.format('%.0f', now), gateway)
redis.call('ZREMRANGEBYSCORE', key, '-inf', string.format('%.0f', now - memory))
-- The clock was set back.
redis.call('ZREMRANGEBYSCORE', key, string.format('%.0f', now + memory), '+inf')
redis.call('PEXPIRE', key, string.format('%.0f', 2 * memory / 1000))
local all = redis.call('ZRANGE', key, 0, -1)
local before = 0
for _, other in ipairs(all) do
  if other < gateway then before = before + 1 end
end
return {#all, before}
