"""Where videos and pages go: whether they can be written there, asked before anything is loaded."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

from ..pipelines.files.whole_files import is_stream
from .errors import BadInput, mention
from .requests.values import check_name


def check_file(field: str, path: Path, suffix: str) -> None:
    """Raise BadInput unless a file with this suffix can be written there."""
    check_name(field, path)
    if path.suffix.lower() != suffix:
        raise BadInput(field, f"the name must end in {suffix}, the only format written", value=path)
    if path.is_dir():
        raise BadInput(field, "it is a folder", "Give the name of a file in it.", value=path)
    if not path.parent.is_dir():
        raise BadInput(field, f"there is no folder {path.parent}", "Create it first.", value=path)
    if is_stream(path):
        _check_stream(field, path, "it", path)
    else:
        check_writable(field, path)


def check_files(field: str, given: Path, files: Iterable[Path], inputs: Mapping[str, Iterable[Path]]) -> None:
    """Raise BadInput unless all files that are written for a field can be; those that are there are replaced.

    Args:
        field: of the request.
        given: what it is; see `check_file`.
        files: all that is written for it, `given` among them.
        inputs: field -> files that the request reads, which are not to be lost; see `local_files`.
    """
    for file in files:
        what = "it" if file == given else f"{file.name}, which is written for it,"
        other = "Give another name."
        check_name(field, file)
        if file.is_dir():
            raise BadInput(field, f"{what} is a folder", other, value=given)
        for name, sources in inputs.items():
            if file.exists() and any(source.samefile(file) for source in sources):
                raise BadInput(field, f"{what} is the file that {mention(name)} reads", other, value=given)
        if is_stream(file):
            _check_stream(field, file, what, given)
            continue
        try:
            # Where, and with a name as long as, `whole_files.staged` writes.
            real = Path(os.path.realpath(file))
            with tempfile.NamedTemporaryFile(dir=real.parent, prefix=f".{real.name}.", suffix=".part") as tried:
                _fill(tried)
        except OSError as error:
            problem = f"{what} cannot be written (the system says: {error.strerror})"
            raise BadInput(field, problem, other, value=given) from error


def _fill(file: IO[bytes]) -> None:
    """Write a little into a file: a disk that is full makes files, and takes nothing into them."""
    file.write(os.urandom(2**16))  # not zeros, which some file systems do not store
    file.flush()


def _check_stream(field: str, file: Path, what: str, given: Path) -> None:
    """Raise BadInput for what is no file and cannot be written to. It is not opened: a pipe would wait for its reader.

    Args:
        field, given: see `check_files`. file: that is meant. what: the words for it.
    """
    if file.suffix.lower() == ".mp4" and file.is_fifo():
        problem = f"{what} is a pipe, and an MP4 is not written from its beginning to its end"
        raise BadInput(field, problem, "Give the name of a file.", value=given)
    if not os.access(file, os.W_OK):
        raise BadInput(field, f"{what} is not writable", "Give another name.", value=given)


def check_writable(field: str, path: Path, *, value: object = None) -> None:
    """Raise BadInput unless a file can be made beside `path`, or in the nearest folder above it that is there.

    Args:
        field: of the request.
        path: of the file.
        value: what the field is, where that is not `path`.
    """
    value = path if value is None else value
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        if folder.exists():
            problem = f"{folder} is a file, so nothing can be written below it"
            raise BadInput(field, problem, "Give another folder.", value=value)
        folder = folder.parent
    try:
        # Asking the system for its permission bits misses read-only file systems; a file says it for certain.
        with tempfile.TemporaryFile(dir=folder) as tried:
            _fill(tried)
    except OSError as error:
        problem = f"the folder {folder} is not writable (the system says: {error.strerror})"
        raise BadInput(field, problem, "Give another folder.", value=value) from error
