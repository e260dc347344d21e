"""The application under test, in its second version: what a release adds while the first still runs."""

from tidewire import everyone

from .app import make

app = make()

clubs = app.membership("clubs", group="club", member="user", writers=everyone)
"""A membership that the first version does not know."""
app.table("minutes", key=("club", "id"), readers=clubs.of("club"), writers=clubs.of("club"))

rooms = app.tables["members"]
app.table("drafts", key="id", readers=rooms.of("room"), writers=everyone)  # type: ignore[attr-defined]
"""A table of the second version that depends on a membership of the first."""
