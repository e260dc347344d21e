-- Links carry effects from one partition to another, once and in order. For each source, a destination keeps the epoch of
-- the source's owner and the last effect that was taken: generation, ms and seq of the source's change, and which of that
-- change's effects it was.
--
-- Which one is a number. For entries of feeds it is the number of the last feed that got its entry (`feed_number`): a
-- change that is decided again by a new owner may find other readers, so feeds are counted by their own number and not by
-- their place in a list. WHOLE says that all feeds got theirs. For other effects it counts them, from 1 on.
--
-- Lua compares strings by the server's locale (strcoll), where '~' may sort before 'dev:'. Only numbers are compared here.
local NOTHING, WHOLE = -1, 2 ^ 52

local function link_state(key, source)
  local held = redis.call('HGET', key, source) or '0 0 0 0 -1'
  local epoch, generation, ms, seq, which = string.match(held, '^(%d+) (%d+) (%d+) (%d+) (-?%d+)$')
  return tonumber(epoch), {tonumber(generation), tonumber(ms), tonumber(seq), tonumber(which)}
end

local function link_text(epoch, taken)
  return text(epoch) .. ' ' .. text(taken[1]) .. ' ' .. text(taken[2]) .. ' ' .. text(taken[3]) .. ' ' .. text(taken[4])
end

-- Of a feed, a number below WHOLE. The same as `feed_number` in tidewire/redis/functions.py.
local function feed_number(feed)
  return tonumber(string.sub(redis.sha1hex(feed), 1, 13), 16)
end

-- Compare the changes of two effects: -1, 0 or 1.
local function compare(a, b)
  for i = 1, 3 do
    if a[i] ~= b[i] then return a[i] > b[i] and 1 or -1 end
  end
  return 0
end

-- keys: partition, changes, links.
-- args: for each source: source, epoch, how many numbers follow, what the source's partition notes as `fell`.
-- Returns for each source 'OK' or 'FENCED'.
--
-- From now on, effects that an owner before this epoch still sends are refused. Where more was taken than the source had
-- when it fell back, the feeds tell of changes that never were: they begin anew.
register('link_stamp', function(keys, args)
  generation(keys)
  local partition, links = keys[1], keys[3]
  local answers, at = {}, 1
  while at <= #args do
    local source, epoch, count = args[at], tonumber(args[at + 1]), tonumber(args[at + 2])
    local known, taken = link_state(links, source)
    if epoch < known then
      answers[#answers + 1] = 'FENCED'
    else
      for i = at + 3, at + 2 + count, 3 do
        local new, ms, seq = tonumber(args[i]), tonumber(args[i + 1]), tonumber(args[i + 2])
        if taken[1] < new and (taken[2] > ms or (taken[2] == ms and taken[3] > seq)) then
          feeds_begin(partition)
          taken = {new, 0, 0, NOTHING}
        end
      end
      redis.call('HSET', links, source, link_text(epoch, taken))
      answers[#answers + 1] = 'OK'
    end
    at = at + 3 + count
  end
  return answers
end, 'allow-oom')

-- keys: partition, changes, links.
-- args: source, epoch; generation, ms, seq of the first change after the lost ones.
-- All feeds of the partition begin anew, once.
register('link_reset', function(keys, args)
  generation(keys)
  local partition, links = keys[1], keys[3]
  local source, epoch = args[1], tonumber(args[2])
  local effect = {tonumber(args[3]), tonumber(args[4]), tonumber(args[5]), NOTHING}
  local known, taken = link_state(links, source)
  if epoch < known then return redis.error_reply(FENCED) end
  if compare(effect, taken) > 0 then
    feeds_begin(partition)
    redis.call('HSET', links, source, link_text(epoch, effect))
  end
  return 'OK'
end, 'allow-oom')

-- keys: partition, changes, links, then those of the operations.
-- args: source, epoch; then for each effect: generation, ms, seq, number, how many arguments its operations have, the
-- operations (as `operate` takes them). An effect that was taken before is skipped.
register('link_apply', function(keys, args)
  generation(keys)
  local links = keys[3]
  local source, epoch = args[1], tonumber(args[2])
  local known, taken = link_state(links, source)
  if epoch < known then return redis.error_reply(FENCED) end
  local at = 3
  while at <= #args do
    local effect = {tonumber(args[at]), tonumber(args[at + 1]), tonumber(args[at + 2]), tonumber(args[at + 3])}
    local last = at + 4 + tonumber(args[at + 4])
    local order = compare(effect, taken)
    if order > 0 or (order == 0 and effect[4] > taken[4]) then
      operate(keys, args, at + 5, last)
      taken = effect
    end
    at = last + 1
  end
  redis.call('HSET', links, source, link_text(epoch, taken))
  return 'OK'
end, 'allow-oom')
