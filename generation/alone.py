"""One `tune`, or one training, at a time in a folder: two would write into one journal."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from .errors import BadInput

logger = logging.getLogger(__name__)
LOCK, OWNER = ".in_use.lock", ".in_use.owner"
"""Files in the folder: what is locked, and who has it. A locked file cannot be read everywhere, so they are two."""


@contextlib.contextmanager
def alone(folder: Path, does: str = "measures", what: str = "tune") -> Iterator[None]:
    """Nobody else works in a folder while this lasts.

    The lock is one of the system, which ends with its process, however that ends: what a crash leaves is in nobody's
    way. Where a file system has no locks, that is logged, and there is none.

    Args:
        folder: made where it is not there.
        does, what: what is done there, and what does it, in words.

    Raises:
        BadInput: another process, or another call in this one, works in it.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock, owner, locked = FileLock(folder / LOCK), folder / OWNER, True
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        problem = f"{_who(owner)} {does} in it"
        raise BadInput("out", problem, "Wait until that ends, or give another folder.", value=folder) from error
    except (OSError, NotImplementedError) as error:
        logger.warning("%s cannot be locked (%s): start no second %s in it.", folder, error, what)
        locked = False
    if not locked:
        yield
        return
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):  # for a message alone; a disk may be full of what the caller clears away
            owner.write_text(f"process {os.getpid()} on {platform.node()}, since {since},", encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _who(owner: Path) -> str:
    """Who has the lock, in words; between its locking and its writing that is not known."""
    try:
        return owner.read_text(encoding="utf-8") or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"
