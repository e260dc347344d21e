-- Read a page of items in the order of their sort keys.
-- keys: order, items. args: low and high as ZRANGEBYLEX takes them, '1' for descending, max entries, max bytes.
-- Returns {1 if the bytes ended the page, else 0; then sort bytes and record of each}. A page has at least one record.
register('page', function(keys, args)
  local order, items = keys[1], keys[2]
  local low, high, descending, count, max_bytes = args[1], args[2], args[3] == '1', args[4], tonumber(args[5])
  local fields
  if descending then
    fields = redis.call('ZREVRANGEBYLEX', order, high, low, 'LIMIT', '0', count)
  else
    fields = redis.call('ZRANGEBYLEX', order, low, high, 'LIMIT', '0', count)
  end
  local page, size = {0}, 0
  for _, field in ipairs(fields) do
    local record = redis.call('HGET', items, field)
    if record then
      size = size + #record
      if size > max_bytes and #page > 1 then
        page[1] = 1
        break
      end
      page[#page + 1] = field
      page[#page + 1] = record
    end
  end
  return page
end, 'no-writes')
