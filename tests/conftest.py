"""Settings of all tests."""

from hypothesis import settings

# A test is slow when the machine is busy, and no worse for it.
settings.register_profile("tidewire", deadline=None)
settings.load_profile("tidewire")
