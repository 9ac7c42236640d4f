"""What the tests of `tune` share."""

from __future__ import annotations

import pytest
from layer_clock import layer_clock


@pytest.fixture
def layers(pipe):
    """`layers()`: see `layer_clock`, of the pipeline of the module."""
    with layer_clock(pipe) as clock:
        yield clock
