-- The server's replication id, false where there is no INFO (fakeredis). INFO costs about 4 µs, so the answer is kept for a
-- moment. The variables live as long as the server process, and no function that looks at them runs on a replica: a
-- replica that is promoted, and a server that restarts, ask at their first call. A master that became a replica and then
-- a master again has been away for longer than this, and a process that was stopped finds that its time is over.
local KEPT_MS = 100
local server_id, server_until, server_since = false, 0, 0

local function server()
  local now = now_ms()
  if now >= server_until or now < server_since then
    local info = redis.pcall('INFO', 'replication')
    server_id = type(info) == 'string' and string.match(info, 'master_replid:(%x+)') or false
    server_since, server_until = now, now + KEPT_MS
  end
  return server_id
end

-- Of a server that was promoted or restarted, the newest writes may be gone. Its replication id is then another one: the
-- partition gets a new generation, and notes what its changes had come to, in `fell`: "<generation> <ms> <seq> …".
-- KEYS[1] is always the partition, KEYS[2] its changes. Where there is no INFO (fakeredis), all is generation 0.
local function generation(keys)
  local held = redis.call('HMGET', keys[1], 'generation', 'server')
  local id = server()
  if not id or id == held[2] then return held[1] or '0' end
  if not held[2] then
    redis.call('HSET', keys[1], 'server', id)
    return held[1] or '0'
  end
  local minted = text(math.max((tonumber(held[1]) or 0) + 1, now_ms()))
  local ms, seq = string.match(last_id(keys[2]), '^(%d+)-(%d+)$')
  local fell = redis.call('HGET', keys[1], 'fell')
  fell = (fell and fell .. ' ' or '') .. minted .. ' ' .. ms .. ' ' .. seq
  while #fell > 500 do fell = string.match(fell, '^%d+ %d+ %d+ (.*)$') end
  redis.call('HSET', keys[1], 'generation', minted, 'server', id, 'fell', fell)
  -- Of several masters one can go back alone: its feeds may then lack what nobody sends again.
  local cluster = redis.pcall('INFO', 'cluster')
  if type(cluster) == 'string' and string.find(cluster, 'cluster_enabled:1', 1, true) then
    feeds_begin(keys[1])
    redis.call('HSET', keys[1], 'alone', minted)
  end
  return minted
end

-- The fence is the lease's epoch and the partition's generation. KEYS[3] is the lease.
local function fenced(keys, epoch, known)
  local now = generation(keys)
  return now ~= known or redis.call('HGET', keys[3], 'epoch') ~= epoch
end
