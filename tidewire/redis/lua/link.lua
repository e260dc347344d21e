-- Links carry effects from a source partition to a destination, once and in order. For each source, the destination stores the
-- epoch of the source's owner and the last effect that it took: generation, ms and seq of the source's change, and a number
-- within that change.
--
-- For entries of feeds, the number is that of the last feed which got its entry (`feed_number`). A new owner that decides a
-- change again may find other readers, so a count or a place in a list would not tell which feeds had theirs. WHOLE says
-- that all feeds had theirs. Other effects are numbered from 1.
local NOTHING, WHOLE = -1, 2 ^ 52

-- The state of a link: epoch, and the last effect taken as {generation, ms, seq, number}.
local function link_state(key, source)
  local held = redis.call('HGET', key, source) or '0 0 0 0 -1'
  local epoch, generation, ms, seq, which = string.match(held, '^(%d+) (%d+) (%d+) (%d+) (-?%d+)$')
  return tonumber(epoch), {tonumber(generation), tonumber(ms), tonumber(seq), tonumber(which)}
end

-- A link's state as it is stored.
local function link_text(epoch, taken)
  return text(epoch) .. ' ' .. text(taken[1]) .. ' ' .. text(taken[2]) .. ' ' .. text(taken[3]) .. ' ' .. text(taken[4])
end

-- A number below WHOLE for each feed. The same as `feed_number` in tidewire/redis/functions.py.
local function feed_number(feed)
  return tonumber(string.sub(redis.sha1hex(feed), 1, 13), 16)
end

-- Compare the changes of two effects by generation, ms and seq: -1, 0 or 1.
local function compare(a, b)
  for i = 1, 3 do
    if a[i] ~= b[i] then return a[i] > b[i] and 1 or -1 end
  end
  return 0
end

-- Announce new owners of sources, before they read.
-- keys: partition, changes, links. args: for each source: source, epoch, how many numbers follow; then the field `fell` of
-- the source's partition as numbers: generation, ms and seq of each loss.
-- Returns for each source 'OK' or 'FENCED'.
--
-- From now on the destination refuses effects of a former owner, which may have been paused between its read and its send. If the
-- destination took more than the source had after a loss, its feeds hold changes that no longer exist, and are reset.
local STAMP_FIELDS, LOSS_FIELDS = 3, 3
register('link_stamp', function(keys, args)
  if not complete(args, 1, STAMP_FIELDS, 1) then return redis.error_reply(INCOMPLETE) end
  generation(keys)
  local partition, links = keys[1], keys[3]
  local answers, at = {}, 1
  while at <= #args do
    local source, epoch, count = unpack(args, at, at + STAMP_FIELDS - 1)
    at, epoch, count = at + STAMP_FIELDS, tonumber(epoch), tonumber(count)
    local known, taken = link_state(links, source)
    if epoch < known then
      answers[#answers + 1] = 'FENCED'
    else
      for i = at, at + count - 1, LOSS_FIELDS do
        local new, ms, seq = unpack(args, i, i + LOSS_FIELDS - 1)
        new, ms, seq = tonumber(new), tonumber(ms), tonumber(seq)
        if taken[1] < new and (taken[2] > ms or (taken[2] == ms and taken[3] > seq)) then
          feeds_begin(partition)
          taken = {new, 0, 0, NOTHING}
        end
      end
      redis.call('HSET', links, source, link_text(epoch, taken))
      answers[#answers + 1] = 'OK'
    end
    at = at + count
  end
  return answers
end, 'allow-oom')

-- Reset all feeds of the destination, because the source has lost changes unread.
-- keys: partition, changes, links. args: source, epoch; generation, ms and seq of the first change after the lost ones.
--
-- A repeated call finds that the link is past that change, and does nothing.
register('link_reset', function(keys, args)
  local source, epoch, new, ms, seq = args[1], tonumber(args[2]), tonumber(args[3]), tonumber(args[4]), tonumber(args[5])
  generation(keys)
  local partition, links = keys[1], keys[3]
  local effect = {new, ms, seq, NOTHING}
  local known, taken = link_state(links, source)
  if epoch < known then return redis.error_reply(FENCED) end
  if compare(effect, taken) > 0 then
    feeds_begin(partition)
    redis.call('HSET', links, source, link_text(epoch, effect))
  end
  return 'OK'
end, 'allow-oom')

-- Apply effects that are plain commands, such as index entries.
-- keys: partition, changes, links, then those of the commands.
-- args: source, epoch; then for each effect: generation, ms, seq, number, how many arguments its commands have; and the
-- commands, as `operate` takes them.
--
-- An effect that was taken before is skipped, so a repeated call does nothing.
local EFFECT_FIELDS = 5
register('link_apply', function(keys, args)
  local source, epoch, first_effect = args[1], tonumber(args[2]), 3
  if not complete(args, first_effect, EFFECT_FIELDS, 1) then return redis.error_reply(INCOMPLETE) end
  generation(keys)
  local links = keys[3]
  local known, taken = link_state(links, source)
  if epoch < known then return redis.error_reply(FENCED) end
  local at = first_effect
  while at <= #args do
    local new, ms, seq, number, count = unpack(args, at, at + EFFECT_FIELDS - 1)
    local effect = {tonumber(new), tonumber(ms), tonumber(seq), tonumber(number)}
    local first = at + EFFECT_FIELDS
    at = first + tonumber(count)
    local order = compare(effect, taken)
    if order > 0 or (order == 0 and effect[4] > taken[4]) then
      operate(keys, args, first, at - 1)
      taken = effect
    end
  end
  redis.call('HSET', links, source, link_text(epoch, taken))
  return 'OK'
end, 'allow-oom')
