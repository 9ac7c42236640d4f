"""Clips to measure with, which are not trained on."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from ..config import ConfigError
from ..generators import Place, derive_seed
from ..settings import SizeSettings
from .dataset import ClipDataset
from .sampler import Pick

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """What is kept from training.

    Args:
        picks: the clips to measure with, each in its own size.
        clips: indices of every clip of their files.
    """

    picks: tuple[Pick, ...] = ()
    clips: frozenset[int] = frozenset()


def hold_out(dataset: ClipDataset, sizes: Sequence[SizeSettings], count: int) -> HeldOut:
    """Choose clips to measure with, and decode them once to see that they can be.

    Whole files are held out: as few as have enough clips, but up to a tenth of all, so that they differ; videos and
    images in turn, where there are both. Of an endless dataset, the clips are ones that never occur in training.

    Args:
        dataset: of the clips.
        sizes: of the clips that are trained on; a clip that exists in several is measured in the last of them.
        count: how many.

    Raises:
        ConfigError: there are not enough clips, or none would be left to train on.
    """
    members = dataset.members(sizes)
    if members is None:
        return HeldOut(tuple(_pick(2**62 + n, sizes[-1], n, count) for n in range(count)))
    files: dict[int, dict[int, int]] = {}
    for size in sorted(members, reverse=True):
        for index in members[size]:
            files.setdefault(dataset.group(index), {}).setdefault(index, size)
    chosen: list[tuple[int, int]] = []
    clips: set[int] = set()
    left = len(files)
    each = -(-count // max(1, min(count, len(files) // 10)))
    for clip_sizes in _in_turn(files, sizes):
        if len(chosen) >= count:
            break
        good = [(i, s) for i, s in sorted(clip_sizes.items())[:each] if _decodes(dataset, _pick(i, sizes[s], 0, 1))]
        if good:
            chosen += good
            clips |= set(clip_sizes)
            left -= 1
    if len(chosen) < count or not left:
        total = sum(len(clip_sizes) for clip_sizes in files.values())
        raise ConfigError(
            f"validation.clips is {count}, but there are only {total} clips of at least "
            f"{min(s.frames for s in sizes)} frames in {len(files)} files, {len(chosen)} of them to measure with, and "
            "a file must be left to train on: give more files, or fewer clips for validation."
        )
    return HeldOut(tuple(_pick(i, sizes[s], n, count) for n, (i, s) in enumerate(chosen[:count])), frozenset(clips))


def _in_turn(files: Mapping[int, Mapping[int, int]], sizes: Sequence[SizeSettings]) -> Iterator[Mapping[int, int]]:
    """The clips of each file by their size; of videos and images together, one of each in turn."""
    kinds: tuple[list, list] = ([], [])
    for _, clip_sizes in sorted(files.items()):
        kinds[sizes[max(clip_sizes.values())].frames == 1].append(clip_sizes)
    for turn in zip_longest(*kinds):
        yield from (clip_sizes for clip_sizes in turn if clip_sizes is not None)


def _pick(index: int, size: SizeSettings, number: int, count: int) -> Pick:
    place = Place(0, number, count, derive_seed("validation", number))
    return Pick(index, (size.frames, size.height, size.width), place)


def _decodes(dataset: ClipDataset, pick: Pick) -> bool:
    try:
        dataset.pixels(pick)
    except OSError as error:
        logger.warning("%s; another clip is held out instead.", error)
        return False
    return True
