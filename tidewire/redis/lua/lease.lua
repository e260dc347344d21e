-- keys: partition, changes, lease. args: owner, length in ms. Returns {epoch, generation, owner, ms left, fell}; epoch
-- 0: held. An expiry more than one length ahead comes from a clock that has since gone back: it counts as expired.
register('lease_take', function(keys, args)
  local now, length = now_ms(), tonumber(args[2])
  local held = redis.call('HMGET', keys[3], 'owner', 'expires', 'epoch')
  local known = generation(keys)
  local left = (tonumber(held[2]) or 0) - now
  if held[1] and held[1] ~= args[1] and left > 0 and left <= length then return {0, known, held[1], left, ''} end
  local epoch = math.max((tonumber(held[3]) or 0) + 1, now)
  redis.call('HSET', keys[3], 'owner', args[1], 'expires', text(now + length), 'epoch', text(epoch), 'call', '0')
  return {epoch, known, args[1], length, redis.call('HGET', keys[1], 'fell') or ''}
end, 'allow-oom')

-- keys: partition, changes, lease. args: epoch, generation, length in ms. Keeps the epoch. A renewal that arrives after
-- the release, from the keeper's connection, must not bring the lease back.
register('lease_renew', function(keys, args)
  local released = redis.call('HGET', keys[3], 'expires') == '0'
  if released or fenced(keys, args[1], args[2]) then return redis.error_reply(FENCED) end
  redis.call('HSET', keys[3], 'expires', text(now_ms() + tonumber(args[3])))
  return 'OK'
end, 'allow-oom')

-- keys: partition, changes, lease. args: epoch, generation. Anyone may take it from now on.
register('lease_release', function(keys, args)
  if fenced(keys, args[1], args[2]) then return redis.error_reply(FENCED) end
  redis.call('HSET', keys[3], 'expires', '0')
  return 'OK'
end, 'allow-oom')
