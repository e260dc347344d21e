"""The application of benchmarks/isolation.py: mail for the measured users, and one table for each kind of attack."""

from tidewire import App, everyone, nobody, user

app = App("isolation")

app.table("mail", key=("box", "id"), readers=user("to"), writers=user("author"))
"""The table that the measured users write and read."""

groups = app.membership("groups", group="group", member="user", readers=nobody, writers=user("user"))

app.table("documents", key="id", readers=groups.of("group"), indexes={"by_tag": ("tag", "id")})
"""L2: an index over items of many groups."""

app.table("boxes", key=("box", "id"), readers=user("owner"), writers=user("owner"))
"""L3, L4 and L5: large items of one owner."""

app.table("profiles", key="id", readers=groups.peers("owner"))
"""L8: an audience of all who share a group with the owner."""

app.connections(readers=groups.peers("user"))
"""L13: presence goes to all peers of a user."""

cells = app.topic("cell:{id}", followers=everyone)
app.table("posts", key="id", readers=cells.of("cell"), writers=everyone)
"""L14: a topic that is followed from an old cursor again and again."""

app.topic("square:{x}-{y}-{z}.", followers=everyone)
"""L9: a pattern that tempts a matcher to backtrack."""

app.table("lists", key="id", readers=user("to"), writers=user("owner"))
"""An item that is shared with many names."""

app.table("talk", key=("group", "id"), readers=groups.of("group"), writers=groups.of("group"))
"""Messages to a large group."""
