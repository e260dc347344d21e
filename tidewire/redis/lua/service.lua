-- A service's word is a field of the hash `services`: "<expiry in ms> <information>". `swept` is a hash of the gateways
-- whose connections another one has removed, or is about to: id to when. The mark and the beat meet here, in one step
-- each, so that a gateway is either alive or swept, and knows which.

local function expiry(word) return word and tonumber(string.match(word, '^%d+')) end

-- keys: services, swept. args: id, ms until its word expires, information.
-- Returns {swept, now in ms, server, id, word, …}. A service that was swept does not get its word back.
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

-- keys: services, swept. args: id, ms for which the mark is kept. Marks a gateway as swept and returns 1. Returns 0 and
-- marks nothing when its word is valid, or it is not registered. A repeat returns 1.
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

-- keys: services. args: id. Takes a service off the list, unless its word is valid again.
register('service_forget', function(keys, args)
  local id = args[1]
  local expires = expiry(redis.call('HGET', keys[1], id))
  if not expires or expires > now_ms() then return 0 end
  return redis.call('HDEL', keys[1], id)
end, 'allow-oom')
