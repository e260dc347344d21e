"""One small application for all lessons."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

import tidewire.testing
from tidewire import App, claim, everyone, user
from tidewire.testing import Stage

app = App("lessons")

# A note belongs to its owner, who alone reads and writes it.
notes = app.table("notes", key="id", readers=user("owner"), writers=user("owner"), expires="until")

# Everyone reads the news. Only a service key writes them.
news = app.table("news", key="id", readers=everyone)

# Rooms have members. Members read and write the room's messages.
rooms = app.membership("members", group="room", member="user", writers=user("user"))
messages = app.table("messages", key=("room", "id"), readers=rooms.of("room"), writers=rooms.of("room"))

# Offers of a shop, seen by connections with the claim `shop`, and also sorted by price.
offers = app.table("offers", key="id", readers=claim("shop"), indexes={"by_price": ("shop", "price")})

# Positions on a map. Clients follow the cells they look at.
cells = app.topic("cell:{cell}", followers=everyone)
positions = app.table("positions", key="id", readers=cells.of("cell"), writers=user("id"))


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    """The application, with all services in this process and fakeredis behind them."""
    async with tidewire.testing.run(app, partitions=2, drain_seconds=0.02) as stage:
        yield stage
