"""What a dataset holds, as one short text to compare a resumed run by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from ..distributed.generators import Place
from ..distributed.processes import Process
from ..settings import SizeSettings
from .dataset import ClipDataset
from .sampler import Pick


def dataset_identity(
    dataset: ClipDataset, sizes: Sequence[SizeSettings], pixels: bool = True, process: Process | None = None
) -> str:
    """Equal for equal clips and captions in equal sizes, in whatever folder they lie; empty for endless ones.

    Args:
        dataset: of the clips.
        sizes: of the clips.
        pixels: whether what their pixels follow from counts, for which files are read whole; else their outlines.
        process: one of a run of several, in each of which this is called; the main one reads, and tells the others.

    Raises:
        OSError: a file cannot be read any more.
    """
    process = process or Process(torch.device("cpu"))
    return process.decided(lambda: _identity(dataset, sizes, pixels, process), OSError)


def _identity(dataset: ClipDataset, sizes: Sequence[SizeSettings], pixels: bool, process: Process) -> str:
    members = dataset.members(sizes)
    if members is None:
        return ""
    if pixels:
        dataset.identify(process)
    digest = hashlib.sha256()
    for number, indices in sorted(members.items()):
        size = sizes[number]
        for index in indices:
            pick = Pick(index, (size.frames, size.height, size.width), Place(0, 0, 1, 0))
            what = dataset.identity(pick) if pixels else dataset.outline(index)
            digest.update(f"{number} {index} {what} {dataset.caption(index)}\n".encode())
    return digest.hexdigest()[:16]


def file_identity(path: Path) -> str:
    """Equal for equal files, wherever they lie."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
