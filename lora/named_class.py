"""The class that a row of a table of recipes or model families names."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from .config import ConfigError

Row = tuple[str, str] | str | type
"""(module, class) of the package that has the table; "package.module:Class" of any; or the class itself."""


def named_class(row: Row, package: str) -> Any:
    """The class of a row, which is imported first where it is named.

    Args:
        row: see `Row`.
        package: that has the table.

    Raises:
        ConfigError: a row of another form, or a class that is not there.
    """
    if isinstance(row, type):
        return row
    module, _, name = row.partition(":") if isinstance(row, str) else (f".{row[0]}", "", row[1])
    if not name:
        raise ConfigError(f'{row!r} names no class: register the class itself, or "package.module:Class".')
    place = importlib.util.resolve_name(module, package)
    try:
        found = getattr(importlib.import_module(place), name, None)
    except ModuleNotFoundError as error:
        if not f"{place}.".startswith(f"{error.name}."):
            raise  # one that the module itself imports
        found = None
    if found is None:
        raise ConfigError(f"{row!r} was registered, but there is no {name} in a module {place}.")
    return found
