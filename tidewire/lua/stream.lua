-- What is pending for the group, then what is new, so that a call that is repeated gives the same entries again:
-- {now in ms, id of the stream's last entry, entries}.
local function read(stream, group, count)
  local entries = {}
  for _, id in ipairs({'0', '>'}) do
    if #entries < count then
      local some = count - #entries
      local reply = redis.call('XREADGROUP', 'GROUP', group, 'owner', 'COUNT', some, 'STREAMS', stream, id)
      local found = {}
      if reply then
        if type(reply[1]) == 'table' then found = reply[1][2] else found = reply[2] or {} end -- fakeredis: the second
      end
      for i = 1, #found do entries[#entries + 1] = found[i] end
    end
  end
  local last = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', '1')
  return {now_ms(), last[1] and last[1][1] or last_id(stream), entries}
end

-- keys: partition, changes, lease, stream. args: epoch, generation, group, count. Returns what is to be done, as `read`.
register('batch', function(keys, args)
  if fenced(keys, args[1], args[2]) then return redis.error_reply(FENCED) end
  return read(keys[4], args[3], tonumber(args[4]))
end, 'allow-oom')

-- Plain commands, one after another: for each the number of its arguments, command, index of its key, arguments.
local function operate(keys, args, at, last)
  while at <= last do
    local count = tonumber(args[at])
    redis.call(args[at + 1], keys[tonumber(args[at + 2])], unpack(args, at + 3, at + 2 + count))
    at = at + 3 + count
  end
end

-- keys: stream. args: most entries, records. Adds as many as there is room for; returns how many.
register('enqueue', function(keys, args)
  local room = math.min(tonumber(args[1]) - redis.call('XLEN', keys[1]), #args - 1)
  for i = 2, 1 + room do redis.call('XADD', keys[1], '*', 'r', args[i]) end
  return math.max(room, 0)
end, 'allow-oom')

-- keys: partition, changes, lease, stream, then those of the operations. args: epoch, generation, group, count, call number (1,
-- 2, 3… under this epoch), number of ids, ids to acknowledge, then the operations. All of it or, when fenced or done
-- before, nothing. Returns what is to be done next, as `read`.
register('commit', function(keys, args)
  if fenced(keys, args[1], args[2]) then return redis.error_reply(FENCED) end
  local call = redis.call('HGET', keys[3], 'call')
  if tonumber(args[5]) <= tonumber(call) then
    redis.call('HSET', keys[3], 'call', call) -- WAIT and WAITAOF look at what this connection wrote last
  else
    local acknowledged = 6 + tonumber(args[6])
    operate(keys, args, acknowledged + 1, #args)
    for i = 7, acknowledged, 1000 do
      redis.call('XACK', keys[4], args[3], unpack(args, i, math.min(i + 999, acknowledged)))
    end
    redis.call('HSET', keys[3], 'call', args[5])
  end
  return read(keys[4], args[3], tonumber(args[4]))
end, 'allow-oom')
