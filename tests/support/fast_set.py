"""Which parameters of a test are run by `make test`; the others are marked as slow."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def fast(chosen: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """The values as parameters, slow but for the chosen ones, which show alone what is not of one kind alone."""
    return [value if value in chosen else slow(value) for value in values]


def slow(value: Any) -> Any:
    """The value as a parameter of the slow tests."""
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
