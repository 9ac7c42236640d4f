"""The files of a folder: which are taken, and which are left out, by name."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

CAPTION_SUFFIX = ".txt"
METADATA = ("metadata.jsonl", "metadata.csv")


def media_files(folder: Path, suffixes: Sequence[str], kind: str) -> list[Path]:
    """The files below a folder with one of these suffixes, in order; linked folders count as its own.

    Each file and folder is there once: by its own name, or by that of a link where it has none below the folder. What
    is left out is said, by name: other kinds of files, hidden files and folders, links to nothing, further names.

    Args:
        folder: to search.
        suffixes: in lower case, with the point.
        kind: "videos" or "images", for messages.
    """
    found: dict[str, Path] = {}
    links: list[Path] = []
    left: dict[str, list[str]] = {}

    def leave(why: str, path: Path) -> None:
        left.setdefault(why, []).append(path.relative_to(folder).as_posix())

    def refused(error: OSError) -> None:
        logger.warning("%s cannot be read and is left out: %s", error.filename, error.strerror)

    for here, real, files in _folders(folder, leave, refused):
        for file in files:
            path = here / file
            if file.startswith("."):
                leave("is hidden", path)
            elif path.suffix.lower() in suffixes:
                if not path.is_file():
                    leave("is a link to nothing" if path.is_symlink() else "is no plain file", path)
                elif path.is_symlink():
                    links.append(path)
                else:
                    found[os.path.join(real, file)] = path
            elif path.suffix.lower() != CAPTION_SUFFIX and not (here == folder and file in METADATA):
                leave(f"is none of the {kind} that can be read", path)
    for path in sorted(links):
        if found.setdefault(os.path.realpath(path), path) is not path:
            leave("is a link to a file that is there already", path)
    for why, names in left.items():
        logger.warning("%s: left out, because it %s: %s", folder, why, some(names))
    return sorted(found.values())


def _folders(
    top: Path, leave: Callable[[str, Path], None], refused: Callable[[OSError], None]
) -> Iterator[tuple[Path, str, list[str]]]:
    """Each folder below one, where it really is, and its files by name.

    Links come behind the folders that they could lead to, which then keep their own names.
    """
    seen: set[str] = set()
    tops = deque([top])
    while tops:
        links = []
        for name, folders, files in os.walk(tops.popleft(), onerror=refused):
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
            links += [here / sub for sub in folders if (here / sub).is_symlink()]
            yield here, real, sorted(files)
        tops.extend(sorted(links))


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, and how many there are where these are not all."""
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")
