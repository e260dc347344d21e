-- What all functions of the library share. tidewire/redis/functions.py joins the files of this folder into one library and
-- gives library and functions names that end in a digest of the text, so that two releases can run on one server.
--
-- Every key is declared in KEYS, all of one partition. What can be refused is refused before the first write: a write
-- that was done stays done when a later command fails. Each function has a typed wrapper in tidewire/redis/functions.py.

-- 'allow-oom': the function also runs at maxmemory. Everything that frees memory or keeps order must: leases, trims,
-- deletes and acknowledgements. Growing writes are refused earlier, by the store.
-- 'no-writes': the function runs on a server that refuses writes, too.
local function register(name, callback, flag)
  redis.register_function{function_name = name .. '_@VERSION@', callback = callback, flags = {flag}}
end

local function now_ms()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end

local function text(n) return string.format('%.0f', n) end

local FENCED = 'FENCED another worker owns this partition'

-- All feeds of a partition begin anew: those of an epoch up to this one. `newest` is the latest epoch that was given out,
-- perhaps by a server whose clock was ahead.
local function feeds_begin(partition)
  local held = redis.call('HMGET', partition, 'feeds', 'newest')
  local begun = math.max(tonumber(held[1] or '0') + 1, tonumber(held[2] or '0'), now_ms())
  redis.call('HSET', partition, 'feeds', text(begun))
end

-- Of a stream, also of one whose entries are all trimmed.
local function last_id(stream)
  local info = redis.pcall('XINFO', 'STREAM', stream)
  for i = 1, type(info) == 'table' and not info.err and #info or 0, 2 do
    if info[i] == 'last-generated-id' then return info[i + 1] end
  end
  return '0-0'
end
