"""Names of a package that are looked up on first use, because what they stand on takes seconds to import."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def looked_up_later(package: dict[str, Any], places: Mapping[str, str]) -> Callable[[str], object]:
    """The `__getattr__` of a package.

    Args:
        package: its `globals()`, which keep what was looked up.
        places: name -> module of it, relative to the package.
    """

    def __getattr__(name: str) -> object:
        if name not in places:
            raise AttributeError(f"module {package['__name__']!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(places[name], package["__name__"]), name)
        package[name] = value
        return value

    return __getattr__
