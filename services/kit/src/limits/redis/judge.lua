-- Judges one call, and enters it into all of the windows or into none. Everything is in microseconds.
-- KEYS: a window each, as a sorted set of entries by time.
-- ARGV: the entry ('' only looks), then for each key how many calls its window takes, and its length.
-- Answers: the number of the first key without room, or 0; then for each key how many calls count, after how long the
-- oldest leaves, after how long there is room, and the time by which it was judged.
local SMALL_STEP = 1000000   -- a clock that was set back by less than this is waited for
local MOST_MOVED = 10000     -- more entries than this are not moved, but waited for
local SLACK_MS = 5000        -- how long a key outlives its last entry

local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local entry = ARGV[1]
local answer = {0}
local times = {}

local function time_of(key, index)
  return tonumber(redis.call('ZRANGE', key, index, index, 'WITHSCORES')[2])
end

local function text(number)
  return string.format('%.0f', number)
end

for i, key in ipairs(KEYS) do
  local requests, window = tonumber(ARGV[2 * i]), tonumber(ARGV[2 * i + 1])
  local at = now
  local newest = time_of(key, -1)
  if newest and newest > now then
    if newest > now + SMALL_STEP and redis.call('ZCARD', key) <= MOST_MOVED then
      -- The clock was set back: the newest entry becomes one of this moment, and the others keep their distance to it.
      local all = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
      for j = 1, #all, 2 do
        redis.call('ZADD', key, text(tonumber(all[j + 1]) - (newest - now)), all[j])
      end
    else
      at = newest
    end
  end
  times[i] = at
  redis.call('ZREMRANGEBYSCORE', key, '-inf', text(at - window))
  local count = redis.call('ZCARD', key)
  local wait = 0
  -- An entry that is there is that of a command which was sent twice.
  if count >= requests and not (entry ~= '' and redis.call('ZSCORE', key, entry)) then
    wait = time_of(key, count - requests) + window - now
    if answer[1] == 0 then answer[1] = i end
  end
  answer[4 * i - 2], answer[4 * i - 1], answer[4 * i], answer[4 * i + 1] = count, 0, wait, at
end

for i, key in ipairs(KEYS) do
  local window = tonumber(ARGV[2 * i + 1])
  if answer[1] == 0 and entry ~= '' then
    answer[4 * i - 2] = answer[4 * i - 2] + redis.call('ZADD', key, text(times[i]), entry)
    redis.call('PEXPIRE', key, text(math.ceil(window / 1000) + SLACK_MS))
  end
  local oldest = time_of(key, 0)
  if oldest then answer[4 * i - 1] = oldest + window - now end
end
return answer
