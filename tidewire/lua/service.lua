-- keys: services. args: id, ms until its word expires, information. Returns {now in ms, id, expiry and information, …}.
register('service_beat', function(keys, args)
  local now = now_ms()
  redis.call('HSET', keys[1], args[1], text(now + tonumber(args[2])) .. ' ' .. args[3])
  local all = redis.call('HGETALL', keys[1])
  local reply = {text(now)}
  for i = 1, #all do reply[i + 1] = all[i] end
  return reply
end, 'allow-oom')
