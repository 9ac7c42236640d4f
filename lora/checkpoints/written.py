"""Files and folders of a training that are whole or absent: written beside, flushed to disk, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ...autoencoders.file_modes import as_new_files
from ...pipelines.files.whole_files import NotWritten, lacks_room, staged

Tensors = dict[str, torch.Tensor]


def remedy(error: Exception) -> str:
    """Behind what could not be written, what to do about it, as the beginning of a sentence."""
    return "Make room" if lacks_room(error) else "See that it can be"


def save_tensors(
    tensors: Tensors, path: str | Path, metadata: dict[str, str] | None = None, flush: bool = True
) -> Path:
    """Write a safetensors file whole, or not at all; `flush` also survives a loss of power, but takes time.

    Raises:
        NotWritten: it cannot be written.
    """
    path = Path(path)
    with _replaced_file(path) as draft:
        write_tensors(draft, tensors, metadata, flush)
    return path


def save_text(text: str, path: Path) -> None:
    """Write a file in UTF-8 whole, or not at all.

    Raises:
        NotWritten: it cannot be written.
    """
    with _replaced_file(path) as draft:
        write(draft, text.encode())


@contextmanager
def _replaced_file(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its name when the block succeeds and vanishes otherwise."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged(path) as draft:
            yield draft
    except (OSError, SafetensorError) as error:
        raise NotWritten(path, error) from error


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its name when the block succeeds and vanishes otherwise.

    Raises:
        NotWritten: what the block, or this, could not write; of blocks inside one another, with the outer's path.
    """
    draft = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        yield draft
        _flush_folder(draft)
        if target.exists():
            # Such as the same step again, after a resume from before it. One rename cannot replace a folder that is not
            # empty.
            old = target.with_name(f".{target.name}.old.part")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
            try:
                os.replace(draft, target)
            except BaseException:
                os.replace(old, target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(draft, target)
        _flush_folder(target.parent)
    except NotWritten as error:
        raise NotWritten(target, error.reason) from error
    except (OSError, SafetensorError) as error:
        raise NotWritten(target, error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write(path: Path, data: bytes) -> None:
    """Write a file, and have it on the disk; for a folder that is `replaced`."""
    with open(path, "wb") as file:
        file.write(data)
        flush(file)


def flush(file: Any) -> None:
    """Have what was written to an open file on the disk."""
    file.flush()
    os.fsync(file.fileno())


def write_tensors(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None, flushed: bool = True) -> None:
    """As `save_tensors`, for a folder that is `replaced`."""
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata)
    as_new_files(path)
    if flushed:
        with open(path, "rb+") as file:
            flush(file)


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # folders cannot be opened there
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
