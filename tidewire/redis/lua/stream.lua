-- What is pending for the group after an id, then what is new: {now in ms, id of the stream's last entry, entries}.
-- A call that is repeated gives the same entries again. At most `count` entries, and no more once they have `most_bytes`.
local function read(stream, group, after, count, most_bytes)
  local entries, size, some = {}, 0, 4
  local from = after
  while #entries < count and size < most_bytes do
    some = math.min(2 * some, count - #entries)
    local reply = redis.call('XREADGROUP', 'GROUP', group, 'owner', 'COUNT', some, 'STREAMS', stream, from)
    local found = {}
    if reply then
      if type(reply[1]) == 'table' then found = reply[1][2] else found = reply[2] or {} end -- fakeredis: the second
    end
    for i = 1, #found do
      entries[#entries + 1] = found[i]
      local fields = found[i][2] -- none where the entry was trimmed
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

-- keys: partition, changes, lease, stream.
-- args: epoch, generation, group; after which id to read, most entries, most bytes.
-- Returns what is to be done, as `read`.
register('batch', function(keys, args)
  local epoch, known, group, after = args[1], args[2], args[3], args[4]
  if fenced(keys, epoch, known) then return redis.error_reply(FENCED) end
  return read(keys[4], group, after, tonumber(args[5]), tonumber(args[6]))
end, 'allow-oom')

-- Plain commands, one after another: for each the number of its arguments, command, index of its key, arguments.
local function operate(keys, args, at, last)
  while at <= last do
    local count = tonumber(args[at])
    redis.call(args[at + 1], keys[tonumber(args[at + 2])], unpack(args, at + 3, at + 2 + count))
    at = at + 3 + count
  end
end

-- The memory that a stream takes, in bytes; 0 where it is short, which is not worth the look, and in fakeredis.
local SHORT = 16
local function bytes_of(stream, length)
  local size = length > SHORT and redis.pcall('MEMORY', 'USAGE', stream) or 0
  return type(size) == 'number' and size or 0
end

-- keys: stream, the sender's last call. args: call number (greater than all before), most entries, most bytes, ms for
-- which the call is remembered, records. Adds as many as there is room for; returns how many. A call that the client
-- library repeats is given the first one's answer. One that arrives late, after the sender's next call, adds nothing.
register('enqueue', function(keys, args)
  local last, taken = string.match(redis.call('GET', keys[2]) or '', '^(%d+) (%d+)$')
  local number = tonumber(args[1])
  if last and number <= tonumber(last) then return number == tonumber(last) and tonumber(taken) or 0 end
  local length, added = redis.call('XLEN', keys[1]), 0
  local room, size = math.min(tonumber(args[2]) - length, #args - 4), bytes_of(keys[1], length)
  while added < room do
    local record = args[5 + added]
    size = size + #record
    if size > tonumber(args[3]) and length + added > 0 then break end -- the first one always finds room
    redis.call('XADD', keys[1], '*', 'r', record)
    added = added + 1
  end
  redis.call('SET', keys[2], args[1] .. ' ' .. added, 'PX', args[4])
  return added
end, 'allow-oom')

-- keys: stream. args: most entries, most bytes, ms for which the stream is kept, record. For answers, which free memory
-- when they are read: they are added at maxmemory, too. The oldest are dropped when their reader is gone or too slow.
register('answer', function(keys, args)
  redis.call('XADD', keys[1], 'MAXLEN', '~', args[1], '*', 'r', args[4])
  local length = redis.call('XLEN', keys[1])
  while bytes_of(keys[1], length) > tonumber(args[2]) do
    length = math.floor(length / 2)
    redis.call('XTRIM', keys[1], 'MAXLEN', text(length))
  end
  redis.call('PEXPIRE', keys[1], args[3])
  return 'OK'
end, 'allow-oom')

-- keys: partition, changes, lease, stream, then those of the operations.
-- args: epoch, generation, group; after which id to read on, most entries and most bytes to read; call number (1, 2, 3…
-- under this epoch), how many ids follow, ids to acknowledge, then the operations (as `operate` takes them).
-- All of it or, when fenced or done before, nothing. Returns what is to be done next, as `read`.
register('commit', function(keys, args)
  local lease, stream = keys[3], keys[4]
  local epoch, known, group, after = args[1], args[2], args[3], args[4]
  local count, most_bytes, call, acknowledged = tonumber(args[5]), tonumber(args[6]), args[7], tonumber(args[8])
  if fenced(keys, epoch, known) then return redis.error_reply(FENCED) end
  local done = redis.call('HGET', lease, 'call')
  if tonumber(call) <= tonumber(done) then
    redis.call('HSET', lease, 'call', done) -- WAIT and WAITAOF look at what this connection wrote last
  else
    local last = 8 + acknowledged
    operate(keys, args, last + 1, #args)
    for i = 9, last, 1000 do redis.call('XACK', stream, group, unpack(args, i, math.min(i + 999, last))) end
    redis.call('HSET', lease, 'call', call)
  end
  return read(stream, group, after, count, most_bytes)
end, 'allow-oom')

-- keys: stream. args: group. Creates the consumer group from the stream's beginning, unless it is there.
register('ensure_group', function(keys, args)
  local made = redis.pcall('XGROUP', 'CREATE', keys[1], args[1], '0', 'MKSTREAM')
  if type(made) == 'table' and made.err and not string.find(tostring(made.err), 'BUSYGROUP', 1, true) then return made end
  return 'OK'
end, 'allow-oom')
