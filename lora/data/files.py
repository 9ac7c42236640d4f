"""The files of a folder: which are taken, and which are left out, by name."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

CAPTION_SUFFIX = ".txt"
METADATA = ("metadata.jsonl", "metadata.csv")


def media_files(folder: Path, suffixes: Sequence[str], kind: str) -> list[Path]:
    """The files below a folder with one of these suffixes, in order; linked folders count as its own.

    What is left out is said, by name: other kinds of files, hidden files and folders, links to nothing.

    Args:
        folder: to search.
        suffixes: in lower case, with the point.
        kind: "videos" or "images", for messages.
    """
    found, seen = [], set()
    left: dict[str, list[str]] = {}

    def leave(why: str, path: Path) -> None:
        left.setdefault(why, []).append(path.relative_to(folder).as_posix())

    def refused(error: OSError) -> None:
        logger.warning("%s cannot be read and is left out: %s", error.filename, error.strerror)

    for name, folders, files in os.walk(folder, onerror=refused, followlinks=True):
        here = Path(name)
        real = os.path.realpath(here)
        if real in seen:
            leave("leads to a folder that was searched already", here)
            folders.clear()
            continue
        seen.add(real)
        for hidden in [sub for sub in folders if sub.startswith(".")]:
            leave("is hidden", here / hidden)
        folders[:] = sorted(sub for sub in folders if not sub.startswith("."))
        for file in sorted(files):
            path = here / file
            if file.startswith("."):
                leave("is hidden", path)
            elif path.suffix.lower() in suffixes:
                if path.is_file():
                    found.append(path)
                else:
                    leave("is a link to nothing" if path.is_symlink() else "is no plain file", path)
            elif path.suffix.lower() != CAPTION_SUFFIX and not (here == folder and file in METADATA):
                leave(f"is none of the {kind} that can be read", path)
    for why, names in left.items():
        logger.warning("%s: left out, because it %s: %s", folder, why, some(names))
    return sorted(found)


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, and how many there are where these are not all."""
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")
