-- keys: order, items. args: from, to (as ZRANGEBYLEX has them), '1' for descending, count, most bytes.
-- Returns {whether the bytes cut it short, sort bytes, record, …}; it is never cut to nothing.
register('page', function(keys, args)
  local fields
  if args[3] == '1' then
    fields = redis.call('ZREVRANGEBYLEX', keys[1], args[2], args[1], 'LIMIT', '0', args[4])
  else
    fields = redis.call('ZRANGEBYLEX', keys[1], args[1], args[2], 'LIMIT', '0', args[4])
  end
  local page, size = {0}, 0
  for _, field in ipairs(fields) do
    local record = redis.call('HGET', keys[2], field)
    if record then
      size = size + #record
      if size > tonumber(args[5]) and #page > 1 then
        page[1] = 1
        break
      end
      page[#page + 1] = field
      page[#page + 1] = record
    end
  end
  return page
end, 'no-writes')
