"""The application under test, in its first version. `app_next` has the second.

Each table is read in another way. The checker works out again, from these declarations, who should hear of a change.
"""

from tidewire import App, claim, everyone, user


def make() -> App:
    """Version 1."""
    app = App("faults")

    # Users come and go as they like. Tables with the room as partition key are in the room's partition: exact.
    rooms = app.membership("members", group="room", member="user", writers=user("user"))
    in_room = rooms.of("room")
    app.table("messages", key=("room", "id"), readers=in_room, writers=in_room, hidden=("secret",))
    app.table("posts", key=("room", "id"), readers=in_room & claim("tenant"), writers=in_room)
    app.table("files", key=("room", "id"), readers=in_room, writers=in_room)  # large items
    app.table("rows", key=("room", "id"), readers=in_room, writers=in_room)  # written in transactions of 100

    # The readers of a note are members of a group in another partition: eventual.
    app.table("notes", key="id", readers=in_room, writers=everyone)

    # Items that change hands, and are shown to guests.
    app.table("things", key="id", readers=user("owner") | user("guest"), writers=everyone)
    app.table("scans", key="id", readers=user("owner") | user("guest"), writers=everyone)  # large items

    # Items that move from topic to topic, and items for a tenant.
    cells = app.topic("cell:{cell}", followers=everyone)
    app.table("units", key="id", readers=cells.of("cell"), writers=everyone)
    app.table("notices", key=("tenant", "id"), readers=claim("tenant"), writers=everyone)

    # One group of thousands, most of whom are never online.
    crowd = app.membership("crowd", group="hall", member="user", readers=user("user"), writers=user("user"))
    app.table("talks", key=("hall", "id"), readers=crowd.of("hall"), writers=crowd.of("hall"))

    # Memberships that change many times a second, with an index and a topic that depend on them.
    flats = app.membership("flats", group="flat", member="user", writers=user("user"))
    doors = app.topic("flat:{flat}", followers=flats.of("flat"))
    app.table("boards", key="id", readers=doors.of("flat"), writers=everyone)
    app.table("faces", key="user", readers=flats.peers("user"), writers=user("user"))

    # One user's own small item in each partition, with which probes measure pauses.
    app.table("probes", key="user", readers=user("user"), writers=user("user"))

    # What the expensive client asks for: items of many groups under one index key, and large items of its own.
    app.table("papers", key="id", readers=in_room, writers=everyone, indexes={"by_shelf": ("shelf", "id")})
    app.table("pages", key=("book", "id"), readers=user("owner"), writers=user("owner"))

    # An item that it shares with tens of thousands of invented names, and a room of thousands that it writes to.
    app.table("lists", key="id", readers=user("names") | user("owner"), writers=user("owner"))
    mobs = app.membership("mobs", group="mob", member="user", readers=user("user"), writers=user("user"))
    app.table("rants", key=("mob", "id"), readers=mobs.of("mob"), writers=mobs.of("mob"))
    return app


app = make()
