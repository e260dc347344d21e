-- The registration of a process is a field of the hash `services`: "<expiry in ms> <information>". The hash `swept` holds the
-- gateways whose connections another one has removed, or is about to remove: id to time. Heartbeat and mark are one atomic
-- step each, so a gateway is either alive or swept, and finds out which with its next heartbeat.

-- The expiry of a registration in ms, or nil.
local function expiry(registration) return registration and tonumber(string.match(registration, '^%d+')) end

-- Renew a registration, unless the gateway was swept, and list all registrations.
-- keys: services, swept. args: id, ms until it expires, information.
-- Returns {1 if it was swept, else 0; now in ms; replication id; then id and registration of each process}.
register('service_beat', function(keys, args)
  local id, length, information = args[1], tonumber(args[2]), args[3]
  local now = now_ms()
  local swept = redis.call('HEXISTS', keys[2], id)
  if swept == 0 then redis.call('HSET', keys[1], id, text(now + length) .. ' ' .. information) end
  local all = redis.call('HGETALL', keys[1])
  local reply = {swept, text(now), server() or ''}
  for i = 1, #all do reply[i + 3] = all[i] end
  return reply
end, 'allow-oom')

-- Mark a gateway as swept, before its connections are removed.
-- keys: services, swept. args: id, ms for which the mark is kept.
-- Returns 1 if it is marked. Returns 0 if its registration is valid again, or gone. A repeated call returns 1.
register('service_sweep', function(keys, args)
  local id, kept = args[1], tonumber(args[2])
  local now, expires = now_ms(), expiry(redis.call('HGET', keys[1], id))
  if not expires or expires > now then return 0 end
  local marks = redis.call('HGETALL', keys[2])
  for i = 1, #marks, 2 do
    if tonumber(marks[i + 1]) + kept < now then redis.call('HDEL', keys[2], marks[i]) end
  end
  redis.call('HSET', keys[2], id, text(now))
  redis.call('PEXPIRE', keys[2], text(kept))
  return 1
end, 'allow-oom')

-- Remove an expired registration. Does nothing if it is valid again.
-- keys: services. args: id.
register('service_forget', function(keys, args)
  local id = args[1]
  local expires = expiry(redis.call('HGET', keys[1], id))
  if not expires or expires > now_ms() then return 0 end
  return redis.call('HDEL', keys[1], id)
end, 'allow-oom')
