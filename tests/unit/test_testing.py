"""What `tidewire.testing.run` says of wrong settings."""

from __future__ import annotations

import pytest

import tidewire.testing
from tidewire import App
from tidewire.errors import ConfigurationError


async def test_a_setting_that_does_not_exist_is_named_with_those_that_do() -> None:
    with pytest.raises(ConfigurationError, match=r"no setting parts; there are .*partitions"):
        async with tidewire.testing.run(App("notes"), parts=2):
            pass
