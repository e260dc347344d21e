"""The application of benchmarks/fanout.py: news for all."""

from tidewire import App, everyone

app = App("fanout")
app.table("news", key="id", readers=everyone, writers=everyone)
