"""The backend: does a job for a user, and reports to her browser.

TIDEWIRE_KEY=AUTH_KEY python -m tidewire.examples.notify.backend alice
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import time

from tidewire.client import Client

STEPS = 5


async def work(url: str, auth_key: str, user: str, step_s: float = 1.0) -> None:
    """Do one job for a user. The credential is a service key."""
    async with Client(url, auth_key) as client:
        job = secrets.token_hex(4)
        until = int(time.time()) + 3600  # the job is forgotten after an hour
        for step in range(STEPS + 1):
            # The state of the job is an item: a browser that opens later sees it too.
            await client.put("jobs", {"id": job, "owner": user, "done": step, "of": STEPS, "until": until})
            await asyncio.sleep(step_s)
        # A message is an event, not a state: it is in the user's feed, and in no table.
        sent = await client.request("send", user=user, body={"text": f"Job {job} is done."})
        if not sent["connections"]:
            print(f"{user} is not connected, and receives the message when her browser resumes")  # noqa: T201


if __name__ == "__main__":
    asyncio.run(work(os.environ.get("TIDEWIRE_WS_URL", "ws://127.0.0.1:8080"), os.environ["TIDEWIRE_KEY"], sys.argv[1]))
