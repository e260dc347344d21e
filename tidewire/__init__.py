"""Tidewire: write an item, and everyone entitled to see it sees the change, in order, exactly once."""

from tidewire.app import App, Membership, Table, Write
from tidewire.audiences import Audience, everyone, nobody, user

__version__ = "0.1.0"

__all__ = ["App", "Audience", "Membership", "Table", "Write", "everyone", "nobody", "user"]
