"""The clips that recipes measure with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from ..data.dataloader import collate, to_device
from ..data.dataset import ClipDataset
from ..data.latents import Latents
from ..data.sampler import Pick
from ..distributed.generators import Generators, Place
from ..distributed.processes import Process
from .base import Batch

Measure = Callable[[Batch, Generators], dict[str, torch.Tensor]]
"""Numbers of a batch, each a mean over its clips."""


class MeasuredClips:
    """Held-out clips: encoded one at a time, or read from the cache, kept on the CPU, and measured in micro-batches.

    Attributes:
        first_frames: `[3, H, W]` in [-1, 1] of each clip, on the CPU; empty unless they were asked for.

    Args:
        dataset: of the clips.
        picks: of the clips; a batch has those of one size that follow one another.
        latents: what encodes them.
        keep_first_frames: for models that start from a picture.

    Raises:
        OSError: a file that could be decoded when the run began is gone or damaged.
    """

    def __init__(self, dataset: ClipDataset, picks: Sequence[Pick], latents: Latents, keep_first_frames: bool) -> None:
        self.latents = latents
        self._own = {(size.frames, size.height, size.width): size.batch_size for size in latents.sizes}
        self.first_frames: list[torch.Tensor] = []
        self._clips: list[tuple[Pick, Batch]] = []
        for pick in picks:
            pixels = functools.cache(functools.partial(dataset.pixels, pick))
            if keep_first_frames:
                self.first_frames.append(pixels()[:, 0].clone())
            self._clips.append((pick, latents.measured(pick, pixels)))
        if picks:
            latents.release()

    def mean(self, measure: Measure, batch_size: int, process: Process) -> dict[str, float]:
        """Means over all clips, of which each process measures a share; empty without any.

        Args:
            measure: of a batch with its texts, and the random numbers of its clips.
            batch_size: clips at a time, of sizes that do not say it themselves.
            process: on whose device the batches go; every process must call this.

        Raises:
            StopRequested: between two batches.
        """
        device, groups = process.device, list(self._batches(batch_size))

        def totals(number: int) -> dict[str, float]:
            batch, places = _stacked(groups[number])
            batch = self.latents.complete(to_device(batch, device))
            found = measure(batch, Generators(places, device))
            return {name: float(value) * len(places) for name, value in found.items()}

        sums: dict[str, float] = {}
        for part in process.shared(len(groups), totals, "validation batches", everywhere=True):
            for name, value in part.items():
                sums[name] = sums.get(name, 0.0) + value
        return {name: total / len(self._clips) for name, total in sums.items()}

    def _batches(self, batch_size: int) -> Iterator[list[tuple[Pick, Batch]]]:
        held: list[tuple[Pick, Batch]] = []
        for clip in self._clips:
            if held and (
                len(held) == (self._own.get(held[0][0].size) or batch_size) or clip[0].size != held[0][0].size
            ):
                yield held
                held = []
            held.append(clip)
        if held:
            yield held


def _stacked(clips: list[tuple[Pick, Batch]]) -> tuple[Batch, list[Place]]:
    places, batch = collate([(pick.place, parts) for pick, parts in clips])
    return batch, places
