"""The Python client: requests, and an iterator of events that survives reconnects."""

from tidewire.client.client import Client

__all__ = ["Client"]
