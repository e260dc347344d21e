-- Feeds and the bodies that their entries refer to. The first keys of each function are those of a Home
-- (tidewire/redis/keys.py): partition, changes, links, feeds, bodies, references.
local FEEDS, BODIES, REFERENCES, HOME = 4, 5, 6, 6

-- The states of a partition's open feeds are fields of one hash, named by the key of the feed's stream, so that a call reads
-- and writes the states of a thousand feeds in a few commands. A closed feed has none. A state is text:
--   epoch, 13 digits (ms): when this life of the feed began
--   til,   13 digits (ms): until when it is open
--   tag,   10 hex digits:  of the last entry
--   total, digits:         bytes appended in this life
-- An entry's id is "<epoch>-<seq - 1>": the stream counts seq by itself. Its one field is "<tag> <position> <total>\n<body>",
-- where body may be "@<id>", a reference to a body that is kept once for the partition. The announcement is the id, a
-- space, and that field.
local GRACE_MS = 1000 -- entries outlive their state by this time
local ENTRY_BYTES = 100 -- of an entry, beside its body, about

local function epoch_of(state) return string.sub(state, 1, 13) end
local function til_of(state) return string.sub(state, 14, 26) end
local function tag_of(state) return string.sub(state, 27, 36) end
local function total_of(state) return tonumber(string.sub(state, 37)) end

local function feed_born(partition, feed, begun, now, til)
  redis.call('DEL', feed)
  local epoch = math.max(tonumber(begun) + 1, now)
  local newest = tonumber(redis.call('HGET', partition, 'newest') or '0')
  if newest < epoch then redis.call('HSET', partition, 'newest', text(epoch)) end
  return text(epoch) .. til .. string.sub(redis.sha1hex(text(epoch) .. feed), 1, 10) .. '0'
end

-- The state of a feed, begun anew if it must; nil when it is closed. `begun`: feeds of an epoch up to this one begin anew.
local function feed_as_it_is(partition, feed, state, begun, now)
  if not state or tonumber(til_of(state)) <= now then return nil end
  if tonumber(epoch_of(state)) > tonumber(begun) then return state end
  return feed_born(partition, feed, begun, now, til_of(state))
end

-- ── bodies ────────────────────────────────────────────────────────────────────────────────────────────────────────

-- A large body is kept once for all feeds of the partition, in the hash `bodies`. The hash `references` has, for each, until
-- when it is kept at most, and how many entries refer to it: "<til> <count>". It is removed with the last of them, or
-- by the sweep when its time is over, as entries of a feed that expires as a whole are never counted down.
--
-- `may_end`: whether nothing is still to come that refers to it. A unit may be spread over several calls, of which the
-- first finds no open feed.
local function reference_add(keys, id, change, may_end)
  local til, count = string.match(redis.call('HGET', keys[REFERENCES], id) or '', '^(%d+) (%d+)$')
  if not til then return end -- swept meanwhile: readers of the entry get a reset
  count = tonumber(count) + change
  if count > 0 or not may_end then
    redis.call('HSET', keys[REFERENCES], id, til .. ' ' .. text(count))
  else
    redis.call('HDEL', keys[REFERENCES], id)
    redis.call('HDEL', keys[BODIES], id)
  end
end

-- keys: those of the home. args: how long to keep them at most, in ms; then id and body of each.
register('body_put', function(keys, args)
  local til = text(now_ms() + tonumber(args[1]))
  for i = 2, #args, 2 do
    local id, body = args[i], args[i + 1]
    local held = redis.call('HGET', keys[REFERENCES], id)
    redis.call('HSET', keys[REFERENCES], id, til .. ' ' .. (held and string.match(held, '(%d+)$') or '0'))
    if not held then redis.call('HSET', keys[BODIES], id, body) end
  end
  return 'OK'
end, 'allow-oom')

-- keys: those of the home. args: ids. Returns the bodies, false for each that is gone.
register('body_get', function(keys, args)
  local found = {}
  for i = 1, #args do found[i] = redis.call('HGET', keys[BODIES], args[i]) end
  return found
end, 'no-writes')

-- ── appending ─────────────────────────────────────────────────────────────────────────────────────────────────────

-- Remove entries from the front of a feed until at most `most` remain, and at most `most_bytes` in all; never the last
-- one, which tells the seq. References of what is removed are counted down.
local function feed_trim(keys, feed, total, most, most_bytes, has_references)
  local too_many = redis.call('XLEN', feed) - most
  local low = '-'
  while true do
    local entries = redis.call('XRANGE', feed, low, '+', 'COUNT', '65')
    local first_kept
    for i = 1, #entries - 1 do
      local entry = entries[i][2][2]
      local upto, body_at = string.match(entry, '^%x+ [%d-]+ (%d+)\n()')
      if too_many <= 0 and total - tonumber(upto) <= most_bytes then
        first_kept = entries[i][1]
        break
      end
      too_many = too_many - 1
      if has_references and string.byte(entry, body_at) == 64 then
        reference_add(keys, string.sub(entry, body_at + 1), -1, true)
      end
    end
    low = first_kept or entries[#entries][1]
    if first_kept or #entries < 65 then break end
  end
  redis.call('XTRIM', feed, 'MINID', '=', low)
end

-- keys: those of the home, then the entries of each feed.
-- args: source, epoch, most entries and most bytes of a feed; then units. A unit is a change, or all changes of a
-- transaction: generation, ms, seq of its last change; the number of the last feed that gets what the call has of the
-- unit, WHOLE where it has the rest of it; how many appends follow. An append: position, body or "@<id>", bytes of the
-- body; index of its first feed among those keys, how many feeds.
-- Returns how many entries were appended.
--
-- A feed gets all of a unit in one call, so no reader sees a part of a transaction. A unit that was taken before is skipped,
-- for feeds up to the number that was reached. Entry, seq, chained tag and announcement are one step.
register('link_append', function(keys, args)
  generation(keys)
  local call, sha1hex, sub = redis.call, redis.sha1hex, string.sub
  local partition, links, feeds = keys[1], keys[3], keys[FEEDS]
  local source, epoch, most, most_bytes = args[1], tonumber(args[2]), tonumber(args[3]), tonumber(args[4])
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
    if ends == '-0' then call('PEXPIREAT', feed, text(tonumber(til_of(state)) + GRACE_MS)) end
    -- Looked at every 50 entries, and every eighth of the bytes.
    if ends == '00' or ends == '50' or math.floor(8 * before / most_bytes) < math.floor(8 * total / most_bytes) then
      feed_trim(keys, feed, total, most, most_bytes, has_references)
    end
    states[feed], written[feed] = sub(state, 1, 26) .. tag .. text(total), true
    appended = appended + 1
  end

  local at = 5
  while at <= #args do
    local effect = {tonumber(args[at]), tonumber(args[at + 1]), tonumber(args[at + 2]), tonumber(args[at + 3])}
    local count = tonumber(args[at + 4])
    at = at + 5
    local order = compare(effect, taken)
    local after = order == 0 and taken[4] or NOTHING -- feeds up to this number have had theirs
    local is_new = order > 0 or (order == 0 and effect[4] > after)
    if is_new then last = effect end
    for _ = 1, is_new and count or 0 do
      local position, body, size, start, many = unpack(args, at, at + 4)
      local rest, before = '\n' .. body, appended
      size, start = tonumber(size) + ENTRY_BYTES, HOME + tonumber(start)
      for i = start, start + tonumber(many) - 1 do
        local feed = keys[i]
        if after == NOTHING or feed_number(feed) > after then
          local state = feed_as_it_is(partition, feed, states[feed], begun, now)
          if state then append(feed, state, position, rest, size) end
        end
      end
      if string.byte(body) == 64 then reference_add(keys, sub(body, 2), appended - before, effect[4] == WHOLE) end
      at = at + 5
    end
    if not is_new then at = at + 5 * count end
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

-- The one feed of a call: its state, nil when it is closed; and up to which epoch feeds begin anew.
local function feed_held(keys, now)
  local partition, feeds, feed = keys[1], keys[FEEDS], keys[HOME + 1]
  local begun, held = redis.call('HGET', partition, 'feeds') or '0', redis.call('HGET', feeds, feed)
  local state = feed_as_it_is(partition, feed, held, begun, now)
  if state and state ~= held then redis.call('HSET', feeds, feed, state) end
  return state, begun
end

local function feed_reply(feed, state, entries)
  local last = redis.call('XREVRANGE', feed, '+', '-', 'COUNT', '1')
  local seq = last[1] and tonumber(string.sub(last[1][1], 15)) + 1 or 0
  return {epoch_of(state), text(seq), tag_of(state), entries}
end

-- keys: those of the home, entries. args: how long it stays open without being asked for again, in ms.
-- Returns {epoch, seq, tag}.
register('feed_open', function(keys, args)
  generation(keys)
  local feed, now = keys[HOME + 1], now_ms()
  local state, begun = feed_held(keys, now)
  local til = text(now + tonumber(args[1]))
  if state then
    state = epoch_of(state) .. til .. string.sub(state, 27)
  else
    state = feed_born(keys[1], feed, begun, now, til)
  end
  redis.call('HSET', keys[FEEDS], feed, state)
  redis.call('PEXPIREAT', feed, text(tonumber(til) + GRACE_MS))
  return feed_reply(feed, state)
end, 'allow-oom')

-- keys: those of the home, entries. args: seq, most entries, most bytes of their bodies.
-- Returns {epoch, seq, tag, entries after seq}; an epoch '' for a closed feed. The first entry is given whatever its size.
register('feed_read', function(keys, args)
  generation(keys)
  local feed, most_bytes = keys[HOME + 1], tonumber(args[3])
  local state = feed_held(keys, now_ms())
  if not state then return {'', '0', '', {}} end
  local entries, left = {}, tonumber(args[2])
  local low, first = epoch_of(state) .. '-' .. args[1], nil
  while left > 0 do
    local some = redis.call('XRANGE', feed, low, '+', 'COUNT', math.min(left, 50))
    for i = 1, #some do
      local total = tonumber(string.match(some[i][2][2], '^%x+ [%d-]+ (%d+)\n'))
      if first and total - first > most_bytes then return feed_reply(feed, state, entries) end
      first = first or total
      entries[#entries + 1] = some[i]
    end
    left = left - #some
    if #some < 50 then break end
    low = '(' .. some[#some][1]
  end
  return feed_reply(feed, state, entries)
end, 'allow-oom')

-- keys: those of the home. args: cursors of the feeds and of the bodies, '0' for the beginning, '' when done.
-- Forgets feeds that have closed and bodies whose time is over, some at a time. Returns the cursors to go on from.
register('feeds_sweep', function(keys, args)
  local now = now_ms()
  local function sweep(hash, cursor, til_in, also)
    if cursor == '' then return '' end
    local found, over = redis.call('HSCAN', hash, cursor, 'COUNT', '500'), {}
    for i = 1, #found[2], 2 do
      if tonumber(til_in(found[2][i + 1])) <= now then over[#over + 1] = found[2][i] end
    end
    for i = 1, #over, 500 do
      local some = {unpack(over, i, math.min(i + 499, #over))}
      redis.call('HDEL', hash, unpack(some))
      if also then redis.call('HDEL', also, unpack(some)) end
    end
    return found[1] == '0' and '' or found[1]
  end
  local function til_of_reference(value) return string.match(value, '^%d+') end
  return {
    sweep(keys[FEEDS], args[1], til_of),
    sweep(keys[REFERENCES], args[2], til_of_reference, keys[BODIES]),
  }
end, 'allow-oom')
