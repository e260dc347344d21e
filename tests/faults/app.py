"""What the users under test share: rooms with members, things with owners, units in cells, notices for tenants."""

from tidewire import App, claim, everyone, user

app = App("faults")

rooms = app.membership("members", group="room", member="user", writers=user("user"))
"""Whoever likes may come and go."""

messages = app.table(
    "messages", key=("room", "id"), readers=rooms.of("room"), writers=rooms.of("room"), hidden=("secret",)
)
"""In the partition of their room: who is told is exact."""

notes = app.table("notes", key="id", readers=rooms.of("room"), writers=everyone)
"""In partitions of their own: who is told is eventual."""

posts = app.table("posts", key=("room", "id"), readers=rooms.of("room") & claim("tenant"), writers=rooms.of("room"))
"""Of the members of a room, those of one tenant see them."""

things = app.table("things", key="id", readers=user("owner") | user("guest"), writers=everyone)
"""They change hands, and are shown to guests."""

cells = app.topic("cell:{cell}", followers=everyone)
units = app.table("units", key="id", readers=cells.of("cell"), writers=everyone)
"""They go from topic to topic."""

notices = app.table("notices", key=("tenant", "id"), readers=claim("tenant"), writers=everyone)
