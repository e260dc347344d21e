-- Shared by all functions of the library. tidewire/redis/functions.py joins the files of this folder into one library. The
-- names of library and functions end in a digest of its text, so that two releases can run on one server.
--
-- Rules for every function:
--   * All keys are declared in KEYS, and are of one partition.
--   * It begins by naming its arguments. Records that follow in a stride are counted by a constant NAME_FIELDS, which
--     functions.py has too; a test compares them. A list that does not fill its records is refused. Only the commands of
--     `operate` are not checked: one function in Python packs them, and a commit is on the way of every write.
--   * It refuses before its first write. A write stays done when a later command fails.
--   * A repeated call does no harm: the client library repeats a call whose answer was lost.
--   * It compares numbers, never strings with '<': Lua compares strings by the server's locale (strcoll).

-- 'allow-oom': the function also runs at maxmemory. Everything that frees memory or keeps order must do so: leases, trims,
-- deletes and acknowledgements. The store refuses growing writes earlier.
-- 'no-writes': the function also runs on a server that refuses writes.
local function register(name, callback, flag)
  redis.register_function{function_name = name .. '_@VERSION@', callback = callback, flags = {flag}}
end

local function now_ms()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end

local function text(n) return string.format('%.0f', n) end

-- Ownership ends with the epoch and the generation, not with the time: a lease that has expired still commits until
-- another owner takes it.
local FENCED = 'FENCED this caller no longer owns the partition: it has another owner, or Redis has gone back'
local INCOMPLETE = 'ERR the arguments end within a record: caller and library differ'

-- Whether the records from args[at] on are all there. The last field of each says how many parts follow it, and a part is
-- `stride` arguments.
local function complete(args, at, fields, stride)
  while at <= #args do at = at + fields + stride * tonumber(args[at + fields - 1] or 0) end
  return at == #args + 1
end

-- Reset all feeds of a partition: those whose epoch is not above the field `feeds`. The field `newest` is the highest epoch
-- that was given out, perhaps by a server whose clock was ahead, so the new epochs are above it.
local function feeds_begin(partition)
  local held = redis.call('HMGET', partition, 'feeds', 'newest')
  local begun = math.max(tonumber(held[1] or '0') + 1, tonumber(held[2] or '0'), now_ms())
  redis.call('HSET', partition, 'feeds', text(begun))
end

-- The id of the last entry that was ever added to a stream, even if all its entries are trimmed.
local function last_id(stream)
  local info = redis.pcall('XINFO', 'STREAM', stream)
  for i = 1, type(info) == 'table' and not info.err and #info or 0, 2 do
    if info[i] == 'last-generated-id' then return info[i + 1] end
  end
  return '0-0'
end
