"""Tidewire: write an item, and everyone entitled to see it sees the change, in order, exactly once."""

from tidewire.app import App, Membership, Table, Write
from tidewire.audiences import Audience, Topic, claim, everyone, nobody, topic, user

__version__ = "0.1.0"

__all__ = ["App", "Audience", "Membership", "Table", "Topic", "Write", "claim", "everyone", "nobody", "topic", "user"]
