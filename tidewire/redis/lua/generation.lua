-- The server's replication id, or false without INFO (fakeredis). INFO costs about 4 µs, so its answer is kept for a moment.
--
-- Why that is safe: the variables live as long as the server process, and these functions run only on a master. A promoted
-- replica and a restarted server have no kept answer. A master that was demoted and promoted again was away for longer
-- than KEPT_MS. A server process that was stopped finds that the time is over when it continues.
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

-- The field `fell` with one more loss. It keeps the newest ones.
local MAX_LOSSES_BYTES = 500
local function losses_with(held, generation, last)
  local ms, seq = string.match(last, '^(%d+)-(%d+)$')
  local losses = (held and held .. ' ' or '') .. generation .. ' ' .. ms .. ' ' .. seq
  while #losses > MAX_LOSSES_BYTES do losses = string.match(losses, '^%d+ %d+ %d+ (.*)$') end
  return losses
end

-- The partition's generation. keys[1] is the partition, keys[2] its change stream.
--
-- A server that was promoted or restarted may lack the newest writes. Its replication id differs from the one that the
-- partition notes. The partition then begins a new generation, and appends to its field `fell` where its changes ended:
-- "<generation> <ms> <seq> …". Without INFO (fakeredis), the generation is always 0.
local function generation(keys)
  local held = redis.call('HMGET', keys[1], 'generation', 'server')
  local id = server()
  if not id or id == held[2] then return held[1] or '0' end
  if not held[2] then
    redis.call('HSET', keys[1], 'server', id)
    return held[1] or '0'
  end
  local minted = text(math.max((tonumber(held[1]) or 0) + 1, now_ms()))
  local losses = losses_with(redis.call('HGET', keys[1], 'fell'), minted, last_id(keys[2]))
  redis.call('HSET', keys[1], 'generation', minted, 'server', id, 'fell', losses)
  -- On a cluster, one master can lose writes while the others keep theirs. Its feeds may lack entries that no source sends
  -- again, so they are reset. The indexer reads the field `alone`, and repairs the entries that lie here.
  local cluster = redis.pcall('INFO', 'cluster')
  if type(cluster) == 'string' and string.find(cluster, 'cluster_enabled:1', 1, true) then
    feeds_begin(keys[1])
    redis.call('HSET', keys[1], 'alone', minted)
  end
  return minted
end

-- Whether the caller has lost the partition: its lease has another epoch, or the partition another generation. keys[3] is
-- the lease.
local function fenced(keys, epoch, known)
  local now = generation(keys)
  return now ~= known or redis.call('HGET', keys[3], 'epoch') ~= epoch
end
