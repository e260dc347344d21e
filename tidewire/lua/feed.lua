-- The states of a partition's open feeds are in one hash, by the key of their entries, so that a call reads all it needs
-- at once, and writes them at once: "<epoch><until><tag>", of 13 digits (ms), 13 digits (ms) and 10 letters, the tag of
-- the last entry. A closed feed has none. An entry's id is "<epoch>-<seq - 1>", which the stream counts by itself, and
-- it has one field, "<tag> <position>\n<body>": what is announced, after the id.
local GRACE = 1000 -- ms that entries outlive their state

local function feed_born(partition, feed, begun, now, til)
  redis.call('DEL', feed)
  local epoch = text(math.max(tonumber(begun) + 1, tonumber(now)))
  local newest = redis.call('HGET', partition, 'newest')
  if not newest or newest < epoch then redis.call('HSET', partition, 'newest', epoch) end
  return epoch .. til .. string.sub(redis.sha1hex(epoch .. feed), 1, 10)
end

-- Of a feed: its state, begun anew if it must; nil when it is closed.
local function feed_as_it_is(partition, feed, state, begun, now)
  local til = state and string.sub(state, 14, 26)
  if not til or til <= now then return nil end
  if string.sub(state, 1, 13) > begun then return state end
  return feed_born(partition, feed, begun, now, til)
end

local function feed_trim(feed, most)
  local size = redis.pcall('MEMORY', 'USAGE', feed)
  if type(size) ~= 'number' or size <= most then return end -- fakeredis has no sizes
  local fit = math.floor(redis.call('XLEN', feed) * most / size * 0.75)
  redis.call('XTRIM', feed, 'MAXLEN', text(math.max(fit, 1))) -- the last one tells the seq
end

-- keys: partition, changes, links, feeds, then the entries of each feed. args: source, epoch, most entries and most bytes
-- of a feed, then for each body: partition, generation, ms, seq of its change; the key of the last feed that gets what the
-- call has of that change, WHOLE where it has the rest of it; the body; of its feeds, the index of the first among those
-- keys, and how many they are. Returns how many entries were appended. What is at or below the position already taken from
-- this source is skipped. Entry, seq, chained tag and announcement are one step.
register('link_append', function(keys, args)
  generation(keys)
  local call, sha1hex, sub = redis.call, redis.sha1hex, string.sub
  local source, epoch, most, most_bytes = args[1], tonumber(args[2]), args[3], tonumber(args[4])
  local known, taken = link_state(keys[3], source)
  if epoch < known then return redis.error_reply(FENCED) end
  local begun, now = call('HGET', keys[1], 'feeds') or '0', text(now_ms())
  local states, written = {}, {}
  for i = 5, #keys, 1000 do
    local last = math.min(i + 999, #keys)
    local held = call('HMGET', keys[4], unpack(keys, i, last))
    for j = i, last do states[keys[j]] = held[j - i + 1] or nil end
  end
  local appended, last = 0, taken
  for at = 5, #args, 8 do
    local position = args[at] .. '-' .. args[at + 1] .. '-' .. args[at + 2] .. '-' .. args[at + 3]
    local body, start, count = args[at + 5], tonumber(args[at + 6]), tonumber(args[at + 7])
    local effect = {tonumber(args[at + 1]), tonumber(args[at + 2]), tonumber(args[at + 3]), args[at + 4]}
    local order = compare(effect, taken)
    local after = order == 0 and taken[4] or '' -- this feed and those before it have had theirs
    if order < 0 or effect[4] <= after then count = 0 else last = effect end
    local rest, is_large = ' ' .. position .. '\n' .. body, #body * 256 > most_bytes
    for i = 4 + start, 3 + start + count do
      local feed = keys[i]
      local state = feed > after and feed_as_it_is(keys[1], feed, states[feed], begun, now)
      if state then
        local tag = sub(sha1hex(sub(state, 27) .. position), 1, 10)
        local entry = tag .. rest
        local id = call('XADD', feed, 'MAXLEN', '~', most, sub(state, 1, 13) .. '-*', 'e', entry)
        call('SPUBLISH', feed, id .. ' ' .. entry)
        local ends = sub(id, -2)
        if ends == '-0' then call('PEXPIREAT', feed, text(tonumber(sub(state, 14, 26)) + GRACE)) end
        if ends == '00' or is_large then feed_trim(feed, most_bytes) end
        states[feed], written[feed] = sub(state, 1, 26) .. tag, true
        appended = appended + 1
      end
    end
  end
  local some = {}
  for feed in pairs(written) do
    some[#some + 1] = feed
    some[#some + 1] = states[feed]
    if #some == 1000 then
      call('HSET', keys[4], unpack(some))
      some = {}
    end
  end
  if #some > 0 then call('HSET', keys[4], unpack(some)) end
  call('HSET', keys[3], source, link_text(epoch, last))
  return appended
end, 'allow-oom')

local function feed_held(keys, now)
  local begun, held = redis.call('HGET', keys[1], 'feeds') or '0', redis.call('HGET', keys[4], keys[5])
  local state = feed_as_it_is(keys[1], keys[5], held, begun, now)
  if state and state ~= held then redis.call('HSET', keys[4], keys[5], state) end
  return state, begun
end

local function feed_reply(feed, state, entries)
  local last = redis.call('XREVRANGE', feed, '+', '-', 'COUNT', '1')
  local seq = last[1] and tonumber(string.sub(last[1][1], 15)) + 1 or 0
  return {string.sub(state, 1, 13), text(seq), string.sub(state, 27), entries}
end

-- keys: partition, changes, links, feeds, entries. args: how long it stays open without being asked for again, in ms.
-- Returns {epoch, seq, tag}.
register('feed_open', function(keys, args)
  generation(keys)
  local now = now_ms()
  local state, begun = feed_held(keys, text(now))
  local til = text(now + tonumber(args[1]))
  if state then
    state = string.sub(state, 1, 13) .. til .. string.sub(state, 27)
  else
    state = feed_born(keys[1], keys[5], begun, now, til)
  end
  redis.call('HSET', keys[4], keys[5], state)
  redis.call('PEXPIREAT', keys[5], text(tonumber(til) + GRACE))
  return feed_reply(keys[5], state)
end, 'allow-oom')

-- keys: partition, changes, links, feeds, entries. args: seq, count. Returns {epoch, seq, tag, entries after seq}; an epoch
-- '' for a closed feed.
register('feed_read', function(keys, args)
  generation(keys)
  local state = feed_held(keys, text(now_ms()))
  if not state then return {'', '0', '', {}} end
  local from = string.sub(state, 1, 13) .. '-' .. args[1]
  return feed_reply(keys[5], state, redis.call('XRANGE', keys[5], from, '+', 'COUNT', args[2]))
end, 'allow-oom')

-- keys: partition, changes, links, feeds. args: where to go on, '0' for the beginning. Forgets the feeds that have closed,
-- some at a time; returns where to go on, '0' at the end.
register('feeds_sweep', function(keys, args)
  local now, closed = text(now_ms()), {}
  local found = redis.call('HSCAN', keys[4], args[1], 'COUNT', '500')
  for i = 1, #found[2], 2 do
    if string.sub(found[2][i + 1], 14, 26) <= now then closed[#closed + 1] = found[2][i] end
  end
  for i = 1, #closed, 500 do redis.call('HDEL', keys[4], unpack(closed, i, math.min(i + 499, #closed))) end
  return found[1]
end, 'allow-oom')
