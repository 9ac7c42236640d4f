"""What the data become: which clips there are to train on and to measure with, said when a run begins."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from ..settings import SizeSettings
from .dataset import ClipDataset
from .held_out import HeldOut
from .sampler import weight_of, without

logger = logging.getLogger(__name__)


def say_what_the_data_are(
    dataset: ClipDataset,
    sizes: Sequence[SizeSettings],
    held: HeldOut,
    say: Callable[[str], None],
    rate: float | None = None,
) -> None:
    """Say how many clips each size has, what is held out, and what of the files is not as one may expect.

    Args:
        dataset: of the clips.
        sizes: of the clips that are trained on.
        held: what is measured.
        say: takes what is no warning.
        rate: frames a second of the videos that the model makes; None for unknown.
    """
    members = without(dataset.members(sizes), held.clips)
    if members is None:
        return
    clips = {index for indices in members.values() for index in indices}
    files = {dataset.group(index) for index in clips}
    measured = {dataset.group(pick.index) for pick in held.picks}
    trained = f"{_count(len(clips), 'clip')} of {_count(len(files), 'file')} are trained on"
    if held.picks:
        say(f"{trained}, {len(held.picks)} of {_count(len(measured), 'file')} measured.")
    else:
        say(f"{trained}, and none is measured: with validation.clips some are held out for it.")
    rows = [("size", "files", "clips", "share of steps")]
    weights = [weight_of(size, members[number]) for number, size in enumerate(sizes)]
    for number, size in enumerate(sizes):
        own = set(members[number])
        of_files = len({dataset.group(index) for index in own})
        share = f"{weights[number] / sum(weights):.0%}" if sum(weights) else "0%"
        rows.append((_shown(size), str(of_files), str(len(own)), share))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        say("  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]))
    if len(held.clips) > len(clips):
        logger.warning(
            "%d of %d clips are held out with the files of those that are measured, and %d are left to train on: lower "
            "validation.clips, or give more files.", len(held.clips), len(held.clips) + len(clips), len(clips),
        )  # fmt: skip
    for number, size in enumerate(sizes):
        if not members[number]:
            logger.warning(
                "data.sizes.%d (%s) gets no clip, and is never trained: every file has too few frames for it, or "
                "goes to a size whose shape is nearer, or as near with more frames; or is held out. Leave the size "
                "out, or set data.sizes_per_video to all.", number, _shown(size),
            )  # fmt: skip
    for caution in dataset.cautions(sizes, rate):
        logger.warning("%s", caution)


def _shown(size: SizeSettings) -> str:
    return f"{size.frames}x{size.height}x{size.width}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
