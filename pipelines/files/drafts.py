"""Folders that are written beside their place, and appear there whole or not at all."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...autoencoders.file_modes import as_new_files

logger = logging.getLogger(__name__)


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `target` at the end, or vanishes on an error.

    Its weights may be read by whom any new file may be read by.

    Raises:
        OSError: no folder can be made there.
    """
    draft = target.with_name(f".{target.name}.{os.getpid()}.part")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise OSError(
            f"{target} cannot be written, because no folder can be made in {target.parent} ({error.strerror}): give "
            "another place."
        ) from error
    try:
        yield draft
        as_new_files(draft)
        os.replace(draft, target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def take(source: Path, target: Path, link: bool) -> None:
    """Put a folder or a file at another place, as a link where one is wanted and can be made, otherwise as a copy."""
    if link:
        try:
            target.symlink_to(source.resolve(), target_is_directory=source.is_dir())
            return
        except OSError:
            logger.info("%s cannot be linked here, so it is copied.", source)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)
