"""A backend that works for users, and tells each of them how far it is."""

from tidewire import App, user

app = App("notify", static="web")

# A user sees the progress of her own jobs. Only the backend, with a service key, writes them.
jobs = app.table("jobs", key="id", readers=user("owner"), expires="until")
