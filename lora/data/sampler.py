"""Which clips each optimiser step sees: known from the seed alone, and the same however many processes share them."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..distributed.generators import Place, derive_seed
from ..settings import SizeSettings


@dataclass(frozen=True)
class Pick:
    """One clip of one step.

    Args:
        index: of the clip in its data set; for an endless set, a number that makes it.
        size: pixel frames, height and width.
        place: where it stands in training.
    """

    index: int
    size: tuple[int, int, int]
    place: Place


class ClipSampler:
    """The order of the clips in a phase.

    A step has clips of one size. In a finite set every clip of a size is seen once before any is seen again.

    Args:
        sizes: the sizes, with their shares and batch sizes.
        members: indices of the clips of each size (by place in `sizes`); None for an endless set.
        batch_size: clips a process and micro-step, where a size does not say.
        accumulate: micro-steps a step.
        processes: how many there are.
        seed: of the order.

    Raises:
        ValueError: a finite set without clips.
    """

    def __init__(
        self,
        sizes: Sequence[SizeSettings],
        members: Mapping[int, Sequence[int]] | None,
        batch_size: int,
        accumulate: int = 1,
        processes: int = 1,
        seed: int = 0,
    ) -> None:
        self.sizes = tuple(sizes)
        self.members = None if members is None else {k: tuple(v) for k, v in members.items() if v}
        if self.members is not None and not self.members:
            raise ValueError("there are no clips to train on.")
        self.batch_size, self.accumulate, self.processes, self.seed = batch_size, accumulate, processes, seed

    def global_batch(self, size: int) -> int:
        """Clips of a step of the size with this number."""
        return (self.sizes[size].batch_size or self.batch_size) * self.accumulate * self.processes

    def epochs(self, steps: int) -> float | None:
        """How often so many steps show each clip; the mean where sizes differ in their clips a step, and None for an
        endless set."""
        if self.members is None:
            return None
        weights = {size: weight_of(self.sizes[size], listed) for size, listed in self.members.items()}
        shown = sum(weight * self.global_batch(size) for size, weight in weights.items()) / sum(weights.values())
        return steps * shown / sum(map(len, self.members.values()))

    def micro_batches(self, process: int, steps: int, first: int = 0) -> Iterator[list[Pick]]:
        """The micro-batches of one process in the steps `first` to `steps` - 1, `accumulate` for each."""
        for step, size, indices in self._steps(steps):
            if step < first:
                continue
            picks = [self._pick(step, size, number, len(indices), index) for number, index in enumerate(indices)]
            each = len(picks) // (self.accumulate * self.processes)
            for micro in range(self.accumulate):
                start = (micro * self.processes + process) * each
                yield picks[start : start + each]

    def _pick(self, step: int, size: int, number: int, count: int, index: int | None) -> Pick:
        seed = derive_seed(self.seed, step, number)
        chosen = self.sizes[size]
        place = Place(step, number, count, seed)
        return Pick(seed if index is None else index, (chosen.frames, chosen.height, chosen.width), place)

    def _steps(self, steps: int) -> Iterator[tuple[int, int, list[int] | list[None]]]:
        """(step, size, indices of the clips) from the start, which is cheap to pass over."""
        possible = range(len(self.sizes)) if self.members is None else sorted(self.members)
        shares = [weight_of(self.sizes[s], None if self.members is None else self.members[s]) for s in possible]
        orders = {} if self.members is None else {s: self._endless(s) for s in possible}
        for step in range(steps):
            size = random.Random(derive_seed(self.seed, "size", step)).choices(possible, shares)[0]
            count = self.global_batch(size)
            if self.members is None:
                yield step, size, [None] * count
            else:
                yield step, size, [next(orders[size]) for _ in range(count)]

    def _endless(self, size: int) -> Iterator[int]:
        """The clips of a size, shuffled anew each time round."""
        round_number = 0
        while True:
            order = list(self.members[size])
            random.Random(derive_seed(self.seed, "order", size, round_number)).shuffle(order)
            yield from order
            round_number += 1


def weight_of(size: SizeSettings, members: Sequence[int] | None) -> float:
    """How often a size is drawn, against the others: in a finite set as often as it has clips."""
    return size.share * (1 if members is None else len(members))


def without(members: Mapping[int, Sequence[int]] | None, indices: Collection[int]) -> dict[int, list[int]] | None:
    """Members of a finite set without some indices; None stays None."""
    if members is None:
        return None
    gone = set(indices)
    return {size: [index for index in listed if index not in gone] for size, listed in members.items()}


def fitting_sizes(sizes: Sequence[SizeSettings], frames: int | None, single: bool | None) -> list[int]:
    """Numbers of the sizes that a video has enough frames for; see `nearest_size`."""
    return [
        i for i, s in enumerate(sizes) if (frames is None or s.frames <= frames) and single in (None, s.frames == 1)
    ]


def nearest_size(
    sizes: Sequence[SizeSettings], height: int, width: int, frames: int | None = None, single: bool | None = None
) -> int | None:
    """Number of the size whose shape is nearest to a video's, of those it has enough frames for; None without any.

    Of sizes equally near, the one of the most frames and pixels.

    Args:
        sizes: to choose from.
        height, width, frames: of the video; None for enough frames for all.
        single: only sizes of 1 frame, or only those of more; None for all.
    """
    fitting = fitting_sizes(sizes, frames, single)
    if not fitting:
        return None

    def distance(i: int) -> tuple[float, int, int]:
        size = sizes[i]
        off = abs(math.log((size.height / size.width) / (height / width)))
        return round(off, 4), -size.frames, -size.height * size.width

    return min(fitting, key=distance)
