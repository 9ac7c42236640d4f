"""The files of this machine that a request reads, by its fields: nothing that is written may replace them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_OF_FOLDERS = ("model_index.json", "adapter.json", "config.json")
"""What is read in the folder of a model or a decoder and has a suffix that numbers are written with, too."""


def local_files(given: Mapping[str, Any]) -> dict[str, tuple[Path, ...]]:
    """The files among what fields of a request are given; fields without any are left out.

    Args:
        given: field -> a file or folder, or several in a list. Names, hub ids, arrays and pictures are no files.
    """
    found = {}
    for field, value in given.items():
        places = value if isinstance(value, list | tuple) else [value]
        files = (file for place in places if isinstance(place, str | os.PathLike) for file in _files_of(Path(place)))
        if kept := tuple(dict.fromkeys(files)):
            found[field] = kept
    return found


def _files_of(place: Path) -> list[Path]:
    with contextlib.suppress(RuntimeError):  # "~name" of nobody: refused by what reads it
        place = place.expanduser()
    return [file for file in (place, *(place / name for name in _OF_FOLDERS)) if file.is_file()]
