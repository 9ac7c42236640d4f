"""Clips to measure with, which are not trained on."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeVar

from ..config import ConfigError
from ..distributed.generators import Place, derive_seed
from ..settings import SizeSettings
from .dataset import ClipDataset
from .sampler import Pick

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class HeldOut:
    """What is kept from training.

    Args:
        picks: the clips to measure with, each in its own size.
        clips: indices of every clip of their files.
    """

    picks: tuple[Pick, ...] = ()
    clips: frozenset[int] = frozenset()


def hold_out(
    dataset: ClipDataset,
    sizes: Sequence[SizeSettings],
    count: int | None,
    seed: int | None = None,
    usual: int = 8,
    least: int = 0,
) -> HeldOut:
    """Choose clips to measure with, and decode them once to see that they can be.

    Whole files are held out: as few as have enough clips, but up to a tenth of all, so that they differ; videos and
    images in turn, where there are both, and the folders in turn. Of an endless dataset, the clips are ones that never
    occur in training.

    Args:
        dataset: of the clips.
        sizes: of the clips that are trained on; a clip that exists in several is measured in the last of them.
        count: how many; None for a tenth of all, and for fewer where their files have more than a fifth of all.
        seed: of the order in which files are taken; None for that of their names and one folder behind the other, as
            runs have it that began before there was a seed.
        usual, least: with a `count` of None, the most and the fewest that are taken.

    Raises:
        ConfigError: there are not enough clips, or none would be left to train on.
    """
    members = dataset.members(sizes)
    if members is None:
        count = usual if count is None else count
        return HeldOut(tuple(_pick(2**62 + n, sizes[-1], n, count) for n in range(count)))
    files: dict[int, dict[int, int]] = {}
    for size in sorted(members, reverse=True):
        for index in members[size]:
            files.setdefault(dataset.group(index), {}).setdefault(index, size)
    total = sum(map(len, files.values()))
    wanted = max(least, min(usual, total // 10)) if count is None else count
    # Of files that are long, one may hold half of all clips: too many for nobody to have asked.
    most = total if count is not None else total // 5
    chosen: list[tuple[int, int]] = []
    clips: set[int] = set()
    left = len(files)
    each = -(-wanted // max(1, min(wanted, len(files) // 10)))
    for clip_sizes in _in_turn(dataset, files, sizes, seed):
        if len(chosen) >= wanted:
            break
        if len(clips) + len(clip_sizes) > most and len(chosen) >= least:
            continue
        good = [(i, s) for i, s in sorted(clip_sizes.items())[:each] if _decodes(dataset, _pick(i, sizes[s], 0, 1))]
        if good:
            chosen += good
            clips |= set(clip_sizes)
            left -= 1
    short = len(chosen) < (least if count is None else wanted)
    if short or not left:
        raise ConfigError(
            f"validation.clips is {wanted}, but there are only {total} clips of at least "
            f"{min(s.frames for s in sizes)} frames in {len(files)} files, {len(chosen)} of them to measure with, and "
            "a file must be left to train on: give more files, or fewer clips for validation."
        )
    chosen = chosen[:wanted]
    return HeldOut(tuple(_pick(i, sizes[s], n, len(chosen)) for n, (i, s) in enumerate(chosen)), frozenset(clips))


def _in_turn(
    dataset: ClipDataset, files: Mapping[int, Mapping[int, int]], sizes: Sequence[SizeSettings], seed: int | None
) -> Iterator[Mapping[int, int]]:
    """The clips of each file by their size; of videos and images together, one of each in turn, and so of folders."""
    kinds: tuple[dict[int, list], dict[int, list]] = ({}, {})
    for _, clip_sizes in sorted(files.items()):
        folder = 0 if seed is None else dataset.folder(next(iter(clip_sizes)))
        kinds[sizes[max(clip_sizes.values())].frames == 1].setdefault(folder, []).append(clip_sizes)
    if seed is not None:
        for number, folders in enumerate(kinds):
            for folder, listed in folders.items():
                random.Random(derive_seed(seed, "held out", number, folder)).shuffle(listed)
    yield from _alternating([list(_alternating(list(folders.values()))) for folders in kinds])


def _alternating(queues: Sequence[Sequence[T]]) -> Iterator[T]:
    """One of each in turn."""
    for turn in zip_longest(*queues):
        yield from (each for each in turn if each is not None)


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
