"""A chat: rooms that one creates and invites into, messages, and who is online."""

from tidewire import App, Audience, Write, everyone, nobody, user

app = App("chat", static="web")


def who_may_change_members(write: Write) -> Audience:
    """The first one into a room becomes its owner; the owner invites and removes; a member may leave."""
    if write.new is None:
        assert write.old is not None
        if write.old.get("role") == "owner":
            return nobody  # a room without an owner would be anybody's to take
        return rooms.of("room", role="owner") | user("user")
    if write.new.get("role") == "owner":
        if write.old is None and write.new["user"] == write.user:
            return rooms.vacant("room")
        # The owner may rename the room, and stays its owner.
        return rooms.of("room", role="owner") & user("user") if _is_owner(write) else nobody
    if write.old is not None and write.old.get("role") == "owner":
        return nobody
    return rooms.of("room", role="owner")


def _is_owner(write: Write) -> bool:
    return write.old is not None and write.old.get("role") == "owner"


# readers: the members of the room, unless said otherwise
rooms = app.membership("members", group="room", member="user", writers=who_may_change_members)

# Only members read; only a message's author, while a member, writes, edits and deletes it.
messages = app.table(
    "messages",
    key=("room", "id"),
    readers=rooms.of("room"),
    writers=rooms.of("room") & user("author"),
)

app.connections(readers=everyone)  # who is online
