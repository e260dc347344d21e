-- Feeds, and the bodies that their entries refer to. The first keys of each function are those of a Home in
-- tidewire/redis/keys.py: partition, changes, links, feeds, bodies, references.
local FEEDS, BODIES, REFERENCES, HOME = 4, 5, 6, 6

-- The states of a partition's open feeds are fields of one hash, named by the key of the feed's stream. So a call reads and
-- writes the states of a thousand feeds in a few commands. A closed feed has no state. A state is text:
--   epoch, 13 digits: when the feed was opened or last reset, in ms
--   expiry, 13 digits: until when it is open, in ms
--   tag, 10 hex digits: of the last entry
--   total, digits: bytes appended since then
-- The id of an entry is "<epoch>-<seq - 1>", counted by the stream itself. Its one field is "<tag> <position> <total>\n<body>".
-- A body "@<id>" is a reference to a body that is stored once for the partition. The announcement of an entry is its id, a
-- space, and that field.
local GRACE_MS = 1000 -- how long entries outlive the state of their feed, in ms
local ENTRY_BYTES = 100 -- size of an entry beside its body, about

local function epoch_of(state) return string.sub(state, 1, 13) end
local function expiry_of(state) return string.sub(state, 14, 26) end
local function tag_of(state) return string.sub(state, 27, 36) end
local function total_of(state) return tonumber(string.sub(state, 37)) end
local function state_of(epoch, expiry, tag, total) return epoch .. expiry .. tag .. text(total) end

-- The total of an entry, and where its body begins.
local function total_in(entry)
  local total, body_at = string.match(entry, '^%x+ [%d-]+ (%d+)\n()')
  return tonumber(total), body_at
end
local AT_SIGN = 64 -- the byte '@', with which a reference begins

-- Begin a feed: remove its entries, and return a state with a new epoch. The epoch is above `begun` and at least the time, so
-- no earlier cursor of the feed fits.
local function feed_born(partition, feed, begun, now, expiry)
  redis.call('DEL', feed)
  local epoch = math.max(tonumber(begun) + 1, now)
  local newest = tonumber(redis.call('HGET', partition, 'newest') or '0')
  if newest < epoch then redis.call('HSET', partition, 'newest', text(epoch)) end
  return state_of(text(epoch), expiry, string.sub(redis.sha1hex(text(epoch) .. feed), 1, 10), 0)
end

-- The present state of a feed, or nil if it is closed. A feed whose epoch is not above `begun` is reset first.
local function feed_as_it_is(partition, feed, state, begun, now)
  if not state or tonumber(expiry_of(state)) <= now then return nil end
  if tonumber(epoch_of(state)) > tonumber(begun) then return state end
  return feed_born(partition, feed, begun, now, expiry_of(state))
end

-- ── bodies ────────────────────────────────────────────────────────────────────────────────────────────────────────

-- A large body is stored once for all feeds of the partition, in the hash `bodies`. The hash `references` holds for each body
-- "<expiry> <count>": until when it is kept at most, and how many entries refer to it. The body is removed with its last
-- entry. The sweep removes it when it expires, because a feed that expires as a whole counts no entries down.
local function reference_of(held)
  local expiry, count = string.match(held or '', '^(%d+) (%d+)$')
  return expiry, tonumber(count)
end
local function reference_text(expiry, count) return expiry .. ' ' .. text(count) end

-- Change the number of entries that refer to a body.
--
-- `may_end`: whether no further entries will refer to the body. A unit may be spread over several calls, and the first of them
-- may find no open feed.
local function reference_add(keys, id, change, may_end)
  local expiry, count = reference_of(redis.call('HGET', keys[REFERENCES], id))
  if not expiry then return end -- the sweep has removed it: readers of the entry get a reset
  count = count + change
  if count > 0 or not may_end then
    redis.call('HSET', keys[REFERENCES], id, reference_text(expiry, count))
  else
    redis.call('HDEL', keys[REFERENCES], id)
    redis.call('HDEL', keys[BODIES], id)
  end
end

-- Store bodies, before the entries that refer to them.
-- keys: those of the home. args: ms for which they are kept at most; then id and body of each.
--
-- An id is a digest of position and body, so a repeated call stores the same, and keeps the count of references.
local BODY_FIELDS = 2
register('body_put', function(keys, args)
  local kept_ms = tonumber(args[1])
  if (#args - 1) % BODY_FIELDS ~= 0 then return redis.error_reply(INCOMPLETE) end
  local expiry = text(now_ms() + kept_ms)
  for i = 2, #args, BODY_FIELDS do
    local id, body = unpack(args, i, i + BODY_FIELDS - 1)
    local kept, count = reference_of(redis.call('HGET', keys[REFERENCES], id))
    redis.call('HSET', keys[REFERENCES], id, reference_text(expiry, count or 0))
    if not kept then redis.call('HSET', keys[BODIES], id, body) end
  end
  return 'OK'
end, 'allow-oom')

-- Read bodies. keys: those of the home. args: ids. Returns the bodies, false for each that is gone.
register('body_get', function(keys, args)
  local ids, found = args, {}
  for i = 1, #ids do found[i] = redis.call('HGET', keys[BODIES], ids[i]) end
  return found
end, 'no-writes')

-- ── appending ─────────────────────────────────────────────────────────────────────────────────────────────────────

-- Trim the oldest entries of a feed until at most `max_entries` of at most `max_bytes` remain. The last entry always stays,
-- because it tells the seq. References of trimmed entries are counted down.
local function feed_trim(keys, feed, total, max_entries, max_bytes, has_references)
  local too_many = redis.call('XLEN', feed) - max_entries
  local low = '-'
  while true do
    local entries = redis.call('XRANGE', feed, low, '+', 'COUNT', '65')
    local first_kept
    for i = 1, #entries - 1 do
      local entry = entries[i][2][2]
      local upto, body_at = total_in(entry)
      if too_many <= 0 and total - upto <= max_bytes then
        first_kept = entries[i][1]
        break
      end
      too_many = too_many - 1
      if has_references and string.byte(entry, body_at) == AT_SIGN then
        reference_add(keys, string.sub(entry, body_at + 1), -1, true)
      end
    end
    low = first_kept or entries[#entries][1]
    if first_kept or #entries < 65 then break end
  end
  redis.call('XTRIM', feed, 'MINID', '=', low)
end

-- Append to feeds, exactly once, and announce each entry.
-- keys: those of the home, then the streams of the feeds.
-- args: source, epoch, max entries and max bytes of a feed; then units, each followed by its appends.
--   A unit is a change, or all changes of a transaction: generation, ms and seq of its last change; the number of the last
--   feed in this call, or WHOLE if the call has the rest of the unit; how many appends follow.
--   An append: position, body or "@<id>", bytes of the body, index of its first feed among the feeds, how many feeds.
-- Returns how many entries were appended.
--
-- A feed gets a whole unit in one call, so no reader sees a part of a transaction. Entry, seq, tag and announcement are one
-- atomic step. The link says which unit was taken, and up to which feed. So a repeated call, or a new owner that decides the
-- unit again with other readers, appends to each feed once.
local UNIT_FIELDS, APPEND_FIELDS = 5, 5
register('link_append', function(keys, args)
  local source, epoch, max_entries, max_bytes = args[1], tonumber(args[2]), tonumber(args[3]), tonumber(args[4])
  local first_unit = 5
  if not complete(args, first_unit, UNIT_FIELDS, APPEND_FIELDS) then return redis.error_reply(INCOMPLETE) end
  generation(keys)
  local call, sha1hex, sub = redis.call, redis.sha1hex, string.sub
  local partition, links, feeds = keys[1], keys[3], keys[FEEDS]
  local known, taken = link_state(links, source)
  if epoch < known then return redis.error_reply(FENCED) end
  local begun, now = call('HGET', partition, 'feeds') or '0', now_ms()
  local has_references = call('HLEN', keys[REFERENCES]) > 0
  local states, written = {}, {}
  for i = HOME + 1, #keys, 1000 do
    local last = math.min(i + 999, #keys)
    local held = call('HMGET', feeds, unpack(keys, i, last))
    for j = i, last do states[keys[j]] = held[j - i + 1] or nil end
  end

  local appended, last = 0, taken
  local function append(feed, state, position, rest, size)
    local tag = sub(sha1hex(tag_of(state) .. position), 1, 10)
    local before = total_of(state)
    local total = before + size
    local entry = tag .. ' ' .. position .. ' ' .. text(total) .. rest
    local id = call('XADD', feed, epoch_of(state) .. '-*', 'e', entry)
    call('SPUBLISH', feed, id .. ' ' .. entry)
    local ends = sub(id, -2)
    if ends == '-0' then call('PEXPIREAT', feed, text(tonumber(expiry_of(state)) + GRACE_MS)) end
    -- Trim every 50 entries, and every eighth of the bytes: to measure a feed costs more than an append.
    if ends == '00' or ends == '50' or math.floor(8 * before / max_bytes) < math.floor(8 * total / max_bytes) then
      feed_trim(keys, feed, total, max_entries, max_bytes, has_references)
    end
    states[feed], written[feed] = state_of(epoch_of(state), expiry_of(state), tag, total), true
    appended = appended + 1
  end

  local at = first_unit
  while at <= #args do
    local new, ms, seq, upto, count = unpack(args, at, at + UNIT_FIELDS - 1)
    local effect = {tonumber(new), tonumber(ms), tonumber(seq), tonumber(upto)}
    at, count = at + UNIT_FIELDS, tonumber(count)
    local order = compare(effect, taken)
    local after = order == 0 and taken[4] or NOTHING -- feeds up to this number have their entries
    local is_new = order > 0 or (order == 0 and effect[4] > after)
    if is_new then last = effect end
    for _ = 1, is_new and count or 0 do
      local position, body, size, start, many = unpack(args, at, at + APPEND_FIELDS - 1)
      local rest, before = '\n' .. body, appended
      size, start = tonumber(size) + ENTRY_BYTES, HOME + tonumber(start)
      for i = start, start + tonumber(many) - 1 do
        local feed = keys[i]
        if after == NOTHING or feed_number(feed) > after then
          local state = feed_as_it_is(partition, feed, states[feed], begun, now)
          if state then append(feed, state, position, rest, size) end
        end
      end
      if string.byte(body) == AT_SIGN then reference_add(keys, sub(body, 2), appended - before, effect[4] == WHOLE) end
      at = at + APPEND_FIELDS
    end
    if not is_new then at = at + APPEND_FIELDS * count end
  end

  local some = {}
  for feed in pairs(written) do
    some[#some + 1] = feed
    some[#some + 1] = states[feed]
    if #some == 1000 then
      call('HSET', feeds, unpack(some))
      some = {}
    end
  end
  if #some > 0 then call('HSET', feeds, unpack(some)) end
  call('HSET', links, source, link_text(epoch, last))
  return appended
end, 'allow-oom')

-- ── opening and reading ───────────────────────────────────────────────────────────────────────────────────────────

-- The state of the one feed of a call, or nil if it is closed; and the epoch up to which feeds are reset.
local function feed_held(keys, now)
  local partition, feeds, feed = keys[1], keys[FEEDS], keys[HOME + 1]
  local begun, held = redis.call('HGET', partition, 'feeds') or '0', redis.call('HGET', feeds, feed)
  local state = feed_as_it_is(partition, feed, held, begun, now)
  if state and state ~= held then redis.call('HSET', feeds, feed, state) end
  return state, begun
end

-- The reply about a feed: {epoch, seq, tag, entries}.
local function feed_reply(feed, state, entries)
  local last = redis.call('XREVRANGE', feed, '+', '-', 'COUNT', '1')
  local seq = last[1] and tonumber(string.sub(last[1][1], 15)) + 1 or 0
  return {epoch_of(state), text(seq), tag_of(state), entries}
end

-- Open a feed, or extend the time for which it is open.
-- keys: those of the home, the feed's stream. args: ms for which it stays open. Returns {epoch, seq, tag}.
register('feed_open', function(keys, args)
  local window_ms = tonumber(args[1])
  generation(keys)
  local feed, now = keys[HOME + 1], now_ms()
  local state, begun = feed_held(keys, now)
  local expiry = text(now + window_ms)
  if state then
    state = state_of(epoch_of(state), expiry, tag_of(state), total_of(state))
  else
    state = feed_born(keys[1], feed, begun, now, expiry)
  end
  redis.call('HSET', keys[FEEDS], feed, state)
  redis.call('PEXPIREAT', feed, text(tonumber(expiry) + GRACE_MS))
  return feed_reply(feed, state)
end, 'allow-oom')

-- Read a feed and its state at one moment.
-- keys: those of the home, the feed's stream. args: seq to read after, max entries, max bytes of their bodies.
-- Returns {epoch, seq, tag, entries}; an epoch '' for a closed feed. There is at least one entry, whatever its size.
register('feed_read', function(keys, args)
  local after, max_entries, max_bytes = args[1], tonumber(args[2]), tonumber(args[3])
  generation(keys)
  local feed = keys[HOME + 1]
  local state = feed_held(keys, now_ms())
  if not state then return {'', '0', '', {}} end
  local entries, left = {}, max_entries
  local low, first = epoch_of(state) .. '-' .. after, nil
  while left > 0 do
    local some = redis.call('XRANGE', feed, low, '+', 'COUNT', math.min(left, 50))
    for i = 1, #some do
      local total = total_in(some[i][2][2])
      if first and total - first > max_bytes then return feed_reply(feed, state, entries) end
      first = first or total
      entries[#entries + 1] = some[i]
    end
    left = left - #some
    if #some < 50 then break end
    low = '(' .. some[#some][1]
  end
  return feed_reply(feed, state, entries)
end, 'allow-oom')

-- Remove the states of closed feeds, and expired bodies, some at a time.
-- keys: those of the home. args: cursors of the feeds and of the bodies: '0' to begin, '' when done.
-- Returns the cursors to continue from.
register('feeds_sweep', function(keys, args)
  local feeds_cursor, bodies_cursor = args[1], args[2]
  local now = now_ms()
  local function sweep(hash, cursor, expiry_in, also)
    if cursor == '' then return '' end
    local found, over = redis.call('HSCAN', hash, cursor, 'COUNT', '500'), {}
    for i = 1, #found[2], 2 do
      if tonumber((expiry_in(found[2][i + 1]))) <= now then over[#over + 1] = found[2][i] end
    end
    for i = 1, #over, 500 do
      local some = {unpack(over, i, math.min(i + 499, #over))}
      redis.call('HDEL', hash, unpack(some))
      if also then redis.call('HDEL', also, unpack(some)) end
    end
    return found[1] == '0' and '' or found[1]
  end
  return {
    sweep(keys[FEEDS], feeds_cursor, expiry_of),
    sweep(keys[REFERENCES], bodies_cursor, reference_of, keys[BODIES]),
  }
end, 'allow-oom')
