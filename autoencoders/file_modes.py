"""Who may read files of weights: as many as may read any other new file, by the umask.

safetensors writes into a file of its own making that nobody but its owner may read, and renames it.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path


def as_new_files(written: Path) -> None:
    """Give weights that safetensors has just written the mode of files that are made anew.

    Args:
        written: the file, or a folder with such files at any depth.

    Raises:
        OSError: no file can be made beside them.
    """
    if os.name == "nt":  # where files have no such modes
        return
    files = sorted(written.rglob("*.safetensors")) if written.is_dir() else [written]
    if not files:
        return
    # A file of which the mode is seen: the umask itself can only be read by setting it, for all threads.
    probe = written.parent / f".{secrets.token_hex(4)}.part"
    try:
        probe.touch()
        mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)
    for file in files:
        if not file.is_symlink():
            file.chmod(mode)
