-- Take the lease of a partition, with a new epoch.
-- keys: partition, changes, lease. args: owner, length in ms.
-- Returns {epoch, generation, owner, ms left, losses}; epoch 0 if another worker holds the lease.
--
-- An expiry that is further ahead than `length` comes from a clock that has been set back since, and counts as expired. The
-- epoch is at least the time, so it grows even if the lease was lost with a failover.
register('lease_take', function(keys, args)
  local owner, length = args[1], tonumber(args[2])
  local lease, now = keys[3], now_ms()
  local holder, expires, last_epoch = unpack(redis.call('HMGET', lease, 'owner', 'expires', 'epoch'))
  local known = generation(keys)
  local left = (tonumber(expires) or 0) - now
  if holder and holder ~= owner and left > 0 and left <= length then return {0, known, holder, left, ''} end
  local epoch = math.max((tonumber(last_epoch) or 0) + 1, now)
  redis.call('HSET', lease, 'owner', owner, 'expires', text(now + length), 'epoch', text(epoch), 'call', '0')
  return {epoch, known, owner, length, redis.call('HGET', keys[1], 'fell') or ''}
end, 'allow-oom')

-- Renew a lease. It keeps its epoch.
-- keys: partition, changes, lease. args: epoch, generation, length in ms.
--
-- The keeper renews on a connection of its own, so a renewal may arrive after the release. It must not revive the lease.
register('lease_renew', function(keys, args)
  local epoch, known, length = args[1], args[2], tonumber(args[3])
  local lease = keys[3]
  local released = redis.call('HGET', lease, 'expires') == '0'
  if released or fenced(keys, epoch, known) then return redis.error_reply(FENCED) end
  redis.call('HSET', lease, 'expires', text(now_ms() + length))
  return 'OK'
end, 'allow-oom')

-- Release a lease, so that any worker may take the partition.
-- keys: partition, changes, lease. args: epoch, generation.
register('lease_release', function(keys, args)
  local epoch, known = args[1], args[2]
  if fenced(keys, epoch, known) then return redis.error_reply(FENCED) end
  redis.call('HSET', keys[3], 'expires', '0')
  return 'OK'
end, 'allow-oom')
