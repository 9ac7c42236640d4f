"""What a dataset holds, as one short text to compare a resumed run by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from .data.dataset import ClipDataset
from .data.sampler import Pick
from .generators import Place
from .settings import SizeSettings


def dataset_identity(dataset: ClipDataset, sizes: Sequence[SizeSettings], pixels: bool = True) -> str:
    """Equal for equal clips and captions in equal sizes, in whatever folder they lie; empty for endless ones.

    Args:
        dataset: of the clips.
        sizes: of the clips.
        pixels: whether what their pixels follow from counts, for which files are read whole; else their outlines.
    """
    members = dataset.members(sizes)
    if members is None:
        return ""
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
