"""A board of cards that several people edit at once, and see who else is looking."""

from tidewire import App, user

app = App("board", static="web")

# Whoever knows the name of a board may join it, and may leave it.
boards = app.membership("participants", group="board", member="user", writers=user("user"))

# Participants read and write the cards of their boards.
cards = app.table("cards", key=("board", "id"), readers=boards.of("board"), writers=boards.of("board"))

# Participants of a common board see whether the others are connected.
app.connections(readers=boards.peers("user") | user("user"))
