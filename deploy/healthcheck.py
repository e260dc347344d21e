"""Exit with 0 if the service in this container answers a path of its admin port with 200: `healthcheck.py /readyz`."""

import http.client
import os
import sys

connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get("TIDEWIRE_ADMIN_PORT", "8090")), timeout=2)
try:
    connection.request("GET", sys.argv[1])
    status = connection.getresponse().status
except (OSError, http.client.HTTPException) as error:
    sys.exit(f"{sys.argv[1]}: {error}")
if status != 200:
    sys.exit(f"{sys.argv[1]}: {status}")
