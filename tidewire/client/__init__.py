"""The Python client: requests, events that survive reconnects, and live views."""

from tidewire.client.client import Client

__all__ = ["Client"]
