-- Enters calls that were let through while the store was gone. Everything is in microseconds.
-- KEYS: a window each.
-- ARGV: for each key the length of its window and how many entries follow; then of each its age and its name.
local SLACK_MS = 5000

local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local next = 1
for _, key in ipairs(KEYS) do
  local window, entries = tonumber(ARGV[next]), tonumber(ARGV[next + 1])
  next = next + 2
  for _ = 1, entries do
    -- What is there already keeps its time.
    redis.call('ZADD', key, 'NX', string.format('%.0f', now - tonumber(ARGV[next])), ARGV[next + 1])
    next = next + 2
  end
  redis.call('PEXPIRE', key, string.format('%.0f', math.ceil(window / 1000) + SLACK_MS))
end
return 0
