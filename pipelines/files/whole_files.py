"""Files that are written beside their place, and appear there whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the system's errors where a disk, or a quota, is full."""


class NotWritten(OSError):
    """A file or folder that could not be written, and the space that is left; `reason` is the error itself.

    The system names no file where a disk is full.
    """

    def __init__(self, path: Path, reason: Exception) -> None:
        super().__init__(f"{path} could not be written: {reason}. {_free_space(path)}".rstrip())
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[type[NotWritten], tuple[Path, Exception]]:
        return type(self), (self.path, self.reason)  # through the pickle of a worker process


def lacks_room(error: BaseException | None) -> bool:
    """Whether a disk or a quota is full, by an error or by what it came from.

    Libraries that write in other languages have the number of the system's error in their text alone.
    """
    while error is not None:
        if getattr(error, "errno", None) in FULL or any(f"(os error {number})" in str(error) for number in FULL):
            return True
        error = error.reason if isinstance(error, NotWritten) else error.__cause__
    return False


@contextmanager
def staged(path: str | Path) -> Iterator[Path]:
    """A hidden temporary name beside `path`; what was written there takes the final name when the block succeeds.

    The temporary file is removed on any way out, so nobody ever sees half a file under the final name. It lies in the
    same folder because a rename is atomic within one file system only. What the final name has stays as it was but for
    the content: the file that a link leads to is replaced, and not the link, and a file keeps its mode. What is no
    file, such as a pipe or /dev/null, has nothing to be kept whole: it is written to.
    """
    if is_stream(path):  # before links are followed: that of an open pipe, such as /dev/stdout, leads to no path
        yield Path(path)
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield temporary
        if path.is_file():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_stream(path: str | Path) -> bool:
    """Whether something is there that has nothing to be kept whole: a pipe, a terminal, /dev/null."""
    path = Path(path)
    return path.exists() and not (path.is_file() or path.is_dir())


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """A block that writes a file; an error of the system in it is `NotWritten`, which names the file."""
    try:
        yield
    except OSError as error:
        raise NotWritten(Path(path), error) from error


def write_bytes(data: bytes, path: str | Path) -> Path:
    """Write a whole file, or nothing when that fails.

    Raises:
        NotWritten: it cannot be written; what was there is untouched.
    """
    with writing(path), staged(path) as temporary:
        temporary.write_bytes(data)
    return Path(path)


def _free_space(path: Path) -> str:
    """Of the disk of a path that need not be there, such as below a folder that could not be made."""
    for place in (path, *path.absolute().parents):
        with suppress(OSError):
            return f"{shutil.disk_usage(place).free / 2**20:.0f} MiB are free there."
    return ""
