"""Values of a request that must be of a kind: what is harmless is taken, anything else is refused by its field."""

from __future__ import annotations

import contextlib
import errno
import math
import os
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from ...pipelines.errors import shortened
from ..errors import BadInput

MAX_SEED = 2**63 - 1


def whole_number(field: str, value: Any) -> int:
    """An int; 5.0 and numpy's numbers will do. Raise BadInput for anything else."""
    if _is_whole(value):
        return int(value)
    raise BadInput(field, "it must be a whole number", value=repr(value))


def count(field: str, value: Any) -> int:
    """A whole number of at least 1. Raise BadInput for anything else."""
    if _is_whole(value) and value >= 1:
        return int(value)
    raise BadInput(field, "it must be a whole number of at least 1", value=value)


def check_seed(field: str, seed: int) -> None:
    """Raise BadInput for a seed that torch does not take."""
    if not 0 <= seed <= MAX_SEED:
        raise BadInput(field, f"it must be between 0 and {MAX_SEED}", value=seed)


def number(field: str, value: Any) -> float:
    """A float; whole numbers, fractions and numpy's numbers will do. Raise BadInput for anything else."""
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    raise BadInput(field, "it must be a number", value=repr(value))


def check_switches(**given: Any) -> None:
    """Raise BadInput for what is not True or False, numpy's included, such as "no", which is true to Python."""
    for field, value in given.items():
        if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
            raise BadInput(field, "it must be True or False", value=repr(value))


def count_or_share(field: str, value: Any) -> int | float:
    """A count from 0 (int) or a fraction of 0.0 to 1.0 (float). Raise BadInput for anything else."""
    if _is_number(value):
        exact: int | float = int(value) if isinstance(value, Integral) else float(value)
        if exact >= 0 and (isinstance(exact, int) or exact <= 1):
            return exact
    raise BadInput(field, "it is a count (a whole number from 0) or a fraction (0.0 to 1.0)", value=repr(value))


def text(field: str, value: Any) -> str:
    """A text. Raise BadInput for anything else, and for one that no file could hold."""
    if not isinstance(value, str):
        raise BadInput(field, "it must be one text", value=repr(value))
    try:
        value.encode()
    except UnicodeEncodeError:  # surrogates: so Python has bytes of a command line that are of another encoding
        problem = "it holds bytes that are no text in UTF-8"
        raise BadInput(
            field, problem, "Write it in UTF-8, which is what the terminal has to send.", value=repr(value)
        ) from None
    return value


def file_name(field: str, value: Any) -> Path:
    """A path; its text will do, and "~" is the home. Raise BadInput for anything else."""
    if isinstance(value, str | os.PathLike):
        path = Path(value)
        with contextlib.suppress(RuntimeError):  # "~name" of nobody may be the name of a file
            path = path.expanduser()
        check_name(field, path)
        return path
    raise BadInput(field, "it must be the name of a file", value=repr(value))


def check_name(field: str, path: Path) -> None:
    """Raise BadInput for a name that no file can have, which Python refuses with an error of its own."""
    try:
        os.lstat(path)
    except ValueError as error:
        raise BadInput(field, "no file can have that name", "Give another.", value=repr(str(path))) from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            problem = "the name is too long for this system"
            raise BadInput(field, problem, "Give a shorter one.", value=shortened(str(path), 60)) from error


def check_readable(field: str, file: Path) -> None:
    """Raise BadInput for what is no file of pictures or videos, which are looked at first and read then."""
    if file.is_dir():
        raise BadInput(field, "it is a folder", "Give a file.", value=file)
    if file.exists() and not file.is_file():
        raise BadInput(
            field, "it is a pipe or a device, and a file is read more than once", "Save it first.", value=file
        )
    if not file.is_file():
        raise BadInput(field, "there is no such file", value=file)


def places(field: str, value: Any) -> list[str | Path]:
    """Files or folders, one or several in a list. Raise BadInput for anything else."""
    found = [value] if isinstance(value, str | os.PathLike) else value
    if isinstance(found, list | tuple) and all(isinstance(place, str | os.PathLike) for place in found):
        for place in found:
            check_name(field, Path(place))
        return [place if isinstance(place, str) else Path(place) for place in found]
    raise BadInput(field, "it must be a file or a folder, or several in a list", value=repr(value))


def _is_whole(value: Any) -> bool:
    return _is_number(value) and bool(value == int(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
