-- Store the record of a revoked credential, and announce the revocation to all gateways.
-- keys: credentials, revocations. args: id, record, max entries of the stream.
--
-- Both is one step, and it is also done at maxmemory: a key that leaked must be revocable on a full server.
register('credential_revoke', function(keys, args)
  local id, record, max_entries = args[1], args[2], args[3]
  redis.call('HSET', keys[1], id, record)
  redis.call('XADD', keys[2], 'MAXLEN', max_entries, '*', 'credential', id)
  return 'OK'
end, 'allow-oom')
