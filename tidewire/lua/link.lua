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
register('link_stamp', function(keys, args)
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
end, 'allow-oom')

-- keys: partition, changes, links. args: source, epoch, generation, ms, seq of the first change after those that were
-- lost. All feeds of the partition begin anew, once.
register('link_reset', function(keys, args)
  generation(keys)
  local known, taken = link_state(keys[3], args[1])
  if tonumber(args[2]) < known then return redis.error_reply(FENCED) end
  local effect = {tonumber(args[3]), tonumber(args[4]), tonumber(args[5]), NOTHING}
  if compare(effect, taken) > 0 then
    feeds_begin(keys[1])
    redis.call('HSET', keys[3], args[1], link_text(tonumber(args[2]), effect))
  end
  return 'OK'
end, 'allow-oom')

-- keys: partition, changes, links, then those of the operations. args: source, epoch, then for each effect: generation, ms, seq, number,
-- number of arguments of its operations in all, the operations. Taken once and in order, as above.
register('link_apply', function(keys, args)
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
end, 'allow-oom')
