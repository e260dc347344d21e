#!lua name=tidewire_1
-- What must be one atomic step. Every key is declared in KEYS, all of one partition; what can be refused is refused
-- before the first write. tidewire/functions.py has a typed wrapper for each.

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

-- ── generations ───────────────────────────────────────────────────────────────────────────────────────────────────

-- Of a server that was promoted or restarted, the newest writes may be gone. Its replication id is then another one: the
-- partition gets a new generation, and notes what its changes had come to, in `fell`: "<generation> <ms> <seq> …".
-- KEYS[1] is always the partition, KEYS[2] its changes. Where there is no INFO (fakeredis), all is generation 0.
local function generation(keys)
  local held = redis.call('HMGET', keys[1], 'generation', 'server')
  local info = redis.pcall('INFO', 'replication')
  if type(info) ~= 'string' then return held[1] or '0' end
  local server = string.match(info, 'master_replid:(%x+)')
  if server == held[2] then return held[1] or '0' end
  if not held[2] then
    redis.call('HSET', keys[1], 'server', server)
    return held[1] or '0'
  end
  local minted = text(math.max((tonumber(held[1]) or 0) + 1, now_ms()))
  local ms, seq = string.match(last_id(keys[2]), '^(%d+)-(%d+)$')
  local fell = redis.call('HGET', keys[1], 'fell')
  fell = (fell and fell .. ' ' or '') .. minted .. ' ' .. ms .. ' ' .. seq
  while #fell > 500 do fell = string.match(fell, '^%d+ %d+ %d+ (.*)$') end
  redis.call('HSET', keys[1], 'generation', minted, 'server', server, 'fell', fell)
  -- Of several masters one can go back alone: its feeds may then lack what nobody sends again.
  local cluster = redis.pcall('INFO', 'cluster')
  if type(cluster) == 'string' and string.find(cluster, 'cluster_enabled:1', 1, true) then
    feeds_begin(keys[1])
    redis.call('HSET', keys[1], 'alone', minted)
  end
  return minted
end

-- The fence is the lease's epoch and the partition's generation. KEYS[3] is the lease.
local function fenced(keys, epoch, known)
  local now = generation(keys)
  return now ~= known or redis.call('HGET', keys[3], 'epoch') ~= epoch
end

-- ── leases ────────────────────────────────────────────────────────────────────────────────────────────────────────

-- keys: partition, changes, lease. args: owner, length in ms. Returns {epoch, generation, owner, ms left, fell}; epoch
-- 0: held. An expiry more than one length ahead comes from a clock that has since gone back: it counts as expired.
redis.register_function('lease_take', function(keys, args)
  local now, length = now_ms(), tonumber(args[2])
  local held = redis.call('HMGET', keys[3], 'owner', 'expires', 'epoch')
  local known = generation(keys)
  local left = (tonumber(held[2]) or 0) - now
  if held[1] and held[1] ~= args[1] and left > 0 and left <= length then return {0, known, held[1], left, ''} end
  local epoch = math.max((tonumber(held[3]) or 0) + 1, now)
  redis.call('HSET', keys[3], 'owner', args[1], 'expires', text(now + length), 'epoch', text(epoch), 'call', '0')
  return {epoch, known, args[1], length, redis.call('HGET', keys[1], 'fell') or ''}
end)

-- keys: partition, changes, lease. args: epoch, generation, length in ms. Keeps the epoch.
redis.register_function('lease_renew', function(keys, args)
  if fenced(keys, args[1], args[2]) then return redis.error_reply(FENCED) end
  redis.call('HSET', keys[3], 'expires', text(now_ms() + tonumber(args[3])))
  return 'OK'
end)

-- keys: partition, changes, lease. args: epoch, generation. Anyone may take it from now on.
redis.register_function('lease_release', function(keys, args)
  if fenced(keys, args[1], args[2]) then return redis.error_reply(FENCED) end
  redis.call('HSET', keys[3], 'expires', '0')
  return 'OK'
end)

-- ── the partition's stream ────────────────────────────────────────────────────────────────────────────────────────

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
redis.register_function('batch', function(keys, args)
  if fenced(keys, args[1], args[2]) then return redis.error_reply(FENCED) end
  return read(keys[4], args[3], tonumber(args[4]))
end)

-- Plain commands, one after another: for each the number of its arguments, command, index of its key, arguments.
local function operate(keys, args, at, last)
  while at <= last do
    local count = tonumber(args[at])
    redis.call(args[at + 1], keys[tonumber(args[at + 2])], unpack(args, at + 3, at + 2 + count))
    at = at + 3 + count
  end
end

-- keys: stream. args: most entries, records. Adds as many as there is room for; returns how many.
redis.register_function('enqueue', function(keys, args)
  local room = math.min(tonumber(args[1]) - redis.call('XLEN', keys[1]), #args - 1)
  for i = 2, 1 + room do redis.call('XADD', keys[1], '*', 'r', args[i]) end
  return math.max(room, 0)
end)

-- keys: partition, changes, lease, stream, then those of the operations. args: epoch, generation, group, count, call number (1,
-- 2, 3… under this epoch), number of ids, ids to acknowledge, then the operations. All of it or, when fenced or done
-- before, nothing. Returns what is to be done next, as `read`.
redis.register_function('commit', function(keys, args)
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
end)

-- ── links: effects from one partition to another ──────────────────────────────────────────────────────────────────

-- Of each source: its owner's epoch, and the last effect that was taken: generation, ms and seq of its change, and which
-- one of the change it was. Of entries of feeds that is the key of the last feed that got its own, as a change that is
-- decided again may find other readers; WHOLE when all did. Elsewhere it is a number.
local NOTHING, WHOLE = '0', '~'

local function link_state(key, source)
  local held = redis.call('HGET', key, source) or '0 0 0 0 0'
  local e, g, ms, seq, which = string.match(held, '^(%d+) (%d+) (%d+) (%d+) (.*)$')
  return tonumber(e), {tonumber(g), tonumber(ms), tonumber(seq), which}
end

local function link_text(epoch, p)
  return text(epoch) .. ' ' .. text(p[1]) .. ' ' .. text(p[2]) .. ' ' .. text(p[3]) .. ' ' .. p[4]
end

-- How the change of one effect stands to that of another: -1, 0 or 1.
local function compare(a, b)
  for i = 1, 3 do
    if a[i] ~= b[i] then return a[i] > b[i] and 1 or -1 end
  end
  return 0
end

-- keys: partition, changes, links. args: source, epoch, what the source's partition notes as `fell`, each number an
-- argument. From now on, what an owner before this epoch still sends is refused. Where more was taken than the source
-- had when it fell back, its feeds tell of what never was: they begin anew.
redis.register_function('link_stamp', function(keys, args)
  generation(keys)
  local epoch, taken = link_state(keys[3], args[1])
  if tonumber(args[2]) < epoch then return redis.error_reply(FENCED) end
  for i = 3, #args, 3 do
    local new, ms, seq = tonumber(args[i]), tonumber(args[i + 1]), tonumber(args[i + 2])
    if taken[1] < new and (taken[2] > ms or (taken[2] == ms and taken[3] > seq)) then
      feeds_begin(keys[1])
      taken = {new, 0, 0, NOTHING}
    end
  end
  redis.call('HSET', keys[3], args[1], link_text(tonumber(args[2]), taken))
  return 'OK'
end)

-- keys: partition, changes, links. args: source, epoch, generation, ms, seq of the first change after those that were
-- lost. All feeds of the partition begin anew, once.
redis.register_function('link_reset', function(keys, args)
  generation(keys)
  local known, taken = link_state(keys[3], args[1])
  if tonumber(args[2]) < known then return redis.error_reply(FENCED) end
  local effect = {tonumber(args[3]), tonumber(args[4]), tonumber(args[5]), NOTHING}
  if compare(effect, taken) > 0 then
    feeds_begin(keys[1])
    redis.call('HSET', keys[3], args[1], link_text(tonumber(args[2]), effect))
  end
  return 'OK'
end)

-- keys: partition, changes, links, then those of the operations. args: source, epoch, then for each effect: generation, ms, seq, number,
-- number of arguments of its operations in all, the operations. Taken once and in order, as above.
redis.register_function('link_apply', function(keys, args)
  generation(keys)
  local source, epoch = args[1], tonumber(args[2])
  local known, taken = link_state(keys[3], source)
  if epoch < known then return redis.error_reply(FENCED) end
  local at = 3
  while at <= #args do
    local effect = {tonumber(args[at]), tonumber(args[at + 1]), tonumber(args[at + 2]), args[at + 3]}
    local last = at + 4 + tonumber(args[at + 4])
    local order = compare(effect, taken)
    if order > 0 or (order == 0 and tonumber(effect[4]) > tonumber(taken[4])) then
      operate(keys, args, at + 5, last)
      taken = effect
    end
    at = last + 1
  end
  redis.call('HSET', keys[3], source, link_text(epoch, taken))
  return 'OK'
end)

-- ── feeds ─────────────────────────────────────────────────────────────────────────────────────────────────────────

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
redis.register_function('link_append', function(keys, args)
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
end)

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
redis.register_function('feed_open', function(keys, args)
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
end)

-- keys: partition, changes, links, feeds, entries. args: seq, count. Returns {epoch, seq, tag, entries after seq}; an epoch
-- '' for a closed feed.
redis.register_function('feed_read', function(keys, args)
  generation(keys)
  local state = feed_held(keys, text(now_ms()))
  if not state then return {'', '0', '', {}} end
  local from = string.sub(state, 1, 13) .. '-' .. args[1]
  return feed_reply(keys[5], state, redis.call('XRANGE', keys[5], from, '+', 'COUNT', args[2]))
end)

-- keys: partition, changes, links, feeds. args: where to go on, '0' for the beginning. Forgets the feeds that have closed,
-- some at a time; returns where to go on, '0' at the end.
redis.register_function('feeds_sweep', function(keys, args)
  local now, closed = text(now_ms()), {}
  local found = redis.call('HSCAN', keys[4], args[1], 'COUNT', '500')
  for i = 1, #found[2], 2 do
    if string.sub(found[2][i + 1], 14, 26) <= now then closed[#closed + 1] = found[2][i] end
  end
  for i = 1, #closed, 500 do redis.call('HDEL', keys[4], unpack(closed, i, math.min(i + 499, #closed))) end
  return found[1]
end)

-- ── the store's reads ─────────────────────────────────────────────────────────────────────────────────────────────

-- keys: order, items. args: from, to (as ZRANGEBYLEX has them), '1' for descending, count, most bytes.
-- Returns {whether the bytes cut it short, sort bytes, record, …}; it is never cut to nothing.
redis.register_function('page', function(keys, args)
  local fields
  if args[3] == '1' then
    fields = redis.call('ZREVRANGEBYLEX', keys[1], args[2], args[1], 'LIMIT', '0', args[4])
  else
    fields = redis.call('ZRANGEBYLEX', keys[1], args[1], args[2], 'LIMIT', '0', args[4])
  end
  local page, size = {0}, 0
  for _, field in ipairs(fields) do
    local record = redis.call('HGET', keys[2], field)
    if record then
      size = size + #record
      if size > tonumber(args[5]) and #page > 1 then
        page[1] = 1
        break
      end
      page[#page + 1] = field
      page[#page + 1] = record
    end
  end
  return page
end)

-- ── live services ─────────────────────────────────────────────────────────────────────────────────────────────────

-- keys: services. args: id, ms until its word expires, information. Returns {now in ms, id, expiry and information, …}.
redis.register_function('service_beat', function(keys, args)
  local now = now_ms()
  redis.call('HSET', keys[1], args[1], text(now + tonumber(args[2])) .. ' ' .. args[3])
  local all = redis.call('HGETALL', keys[1])
  local reply = {text(now)}
  for i = 1, #all do reply[i + 1] = all[i] end
  return reply
end)
