-- Read for a group: first the entries that are pending after an id, then new ones. Returns {now in ms, id of the stream's last
-- entry, entries}.
--
-- Pending entries come first because a call may be repeated after its answer was lost: the entries that it had read as new
-- are pending by then, and the repeat returns them again. Reading ends at `count` entries, or once they have `max_bytes`.
local function read(stream, group, after, count, max_bytes)
  local entries, size, some = {}, 0, 4
  local from = after
  while #entries < count and size < max_bytes do
    some = math.min(2 * some, count - #entries)
    local reply = redis.call('XREADGROUP', 'GROUP', group, 'owner', 'COUNT', some, 'STREAMS', stream, from)
    local found = {}
    if reply then
      if type(reply[1]) == 'table' then found = reply[1][2] else found = reply[2] or {} end -- fakeredis has the second form
    end
    for i = 1, #found do
      entries[#entries + 1] = found[i]
      local fields = found[i][2] -- false if the entry was trimmed while it was pending
      size = size + (fields and fields[2] and #fields[2] or 0)
    end
    if #found == some then
      if from ~= '>' then from = found[#found][1] end
    elseif from == '>' then
      break
    else
      from = '>'
    end
  end
  local last = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', '1')
  return {now_ms(), last[1] and last[1][1] or last_id(stream), entries}
end

-- Read the next batch of a partition's stream.
-- keys: partition, changes, lease, stream. args: epoch, generation, group, id to read after, max entries, max bytes.
-- Returns what `read` returns.
register('batch', function(keys, args)
  local epoch, known, group, after, count, max_bytes = unpack(args, 1, 6)
  if fenced(keys, epoch, known) then return redis.error_reply(FENCED) end
  return read(keys[4], group, after, tonumber(count), tonumber(max_bytes))
end, 'allow-oom')

-- Do the plain commands that lie in args[at] to args[last]. Each is the number of its arguments, the command, the index of
-- its key, and its arguments.
local COMMAND_FIELDS = 3
local function operate(keys, args, at, last)
  while at <= last do
    local count, command, key = unpack(args, at, at + COMMAND_FIELDS - 1)
    local first = at + COMMAND_FIELDS
    at = first + tonumber(count)
    redis.call(command, keys[tonumber(key)], unpack(args, first, at - 1))
  end
end

-- The memory of a stream in bytes. 0 for a short one, which is not worth measuring, and in fakeredis.
local SHORT = 16
local function bytes_of(stream, length)
  local size = length > SHORT and redis.pcall('MEMORY', 'USAGE', stream) or 0
  return type(size) == 'number' and size or 0
end

-- What a sender's last call did, as it is stored: its number, and how many records were added.
local function sent_of(held)
  local number, added = string.match(held or '', '^(%d+) (%d+)$')
  return tonumber(number), tonumber(added)
end
local function sent_text(number, added) return text(number) .. ' ' .. text(added) end

-- Add records to a stream as far as there is room. Returns how many were added.
-- keys: stream, the sender's last call. args: call number, max entries, max bytes, ms for which the call is remembered; then
-- the records.
--
-- The sender's call numbers grow. A repeated call gets the answer of the first one: on a stream that is full by now it must
-- not be told that its records found no room. A call that arrives after the sender's next one adds nothing.
register('enqueue', function(keys, args)
  local stream, sent = keys[1], keys[2]
  local number, max_entries, max_bytes, kept_ms = tonumber(args[1]), tonumber(args[2]), tonumber(args[3]), args[4]
  local first_record = 5
  local last, taken = sent_of(redis.call('GET', sent))
  if last and number <= last then return number == last and taken or 0 end
  local length, added = redis.call('XLEN', stream), 0
  local room, size = math.min(max_entries - length, #args - first_record + 1), bytes_of(stream, length)
  while added < room do
    local record = args[first_record + added]
    size = size + #record
    if size > max_bytes and length + added > 0 then break end -- an empty stream has room for any record
    redis.call('XADD', stream, '*', 'r', record)
    added = added + 1
  end
  redis.call('SET', sent, sent_text(number, added), 'PX', kept_ms)
  return added
end, 'allow-oom')

-- Add an answer to a reply stream, and drop the oldest ones beyond the bounds: their reader is gone, or too slow.
-- keys: stream. args: max entries, max bytes, ms for which the stream is kept, record.
--
-- A repeated call adds the answer twice. The gateway takes the first one.
register('answer', function(keys, args)
  local stream = keys[1]
  local max_entries, max_bytes, kept_ms, record = args[1], tonumber(args[2]), args[3], args[4]
  redis.call('XADD', stream, 'MAXLEN', '~', max_entries, '*', 'r', record)
  local length = redis.call('XLEN', stream)
  while bytes_of(stream, length) > max_bytes do
    length = math.floor(length / 2)
    redis.call('XTRIM', stream, 'MAXLEN', text(length))
  end
  redis.call('PEXPIRE', stream, kept_ms)
  return 'OK'
end, 'allow-oom')

-- Commit a batch: do its commands and acknowledge its entries, all or nothing. Then read the next batch.
-- keys: partition, changes, lease, stream, then those of the commands.
-- args: epoch, generation, group, id to read after, max entries, max bytes, call number, how many ids follow; the ids to
-- acknowledge; then the commands, as `operate` takes them. Call numbers are 1, 2, 3… under one epoch.
-- Returns what `read` returns.
--
-- A repeated call finds its number in the lease, and does nothing but read. The lease's epoch is checked first, so neither a
-- former owner nor a call from before a failover can commit.
register('commit', function(keys, args)
  local lease, stream = keys[3], keys[4]
  local epoch, known, group, after, count, max_bytes, call, acknowledged = unpack(args, 1, 8)
  local first_id, last_id_at = 9, 8 + tonumber(acknowledged)
  if fenced(keys, epoch, known) then return redis.error_reply(FENCED) end
  local done = redis.call('HGET', lease, 'call')
  if tonumber(call) <= tonumber(done) then
    redis.call('HSET', lease, 'call', done) -- a write, because WAIT and WAITAOF cover what this connection wrote last
  else
    operate(keys, args, last_id_at + 1, #args)
    for i = first_id, last_id_at, 1000 do
      redis.call('XACK', stream, group, unpack(args, i, math.min(i + 999, last_id_at)))
    end
    redis.call('HSET', lease, 'call', call)
  end
  return read(stream, group, after, tonumber(count), tonumber(max_bytes))
end, 'allow-oom')

-- Create a consumer group, from the stream's beginning, unless it exists.
-- keys: stream. args: group.
register('ensure_group', function(keys, args)
  local group = args[1]
  local made = redis.pcall('XGROUP', 'CREATE', keys[1], group, '0', 'MKSTREAM')
  if type(made) == 'table' and made.err and not string.find(tostring(made.err), 'BUSYGROUP', 1, true) then return made end
  return 'OK'
end, 'allow-oom')
