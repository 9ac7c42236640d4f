"""Batches for one process, in the order of a sampler, prepared in the background when asked."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ..distributed.generators import Place
from ..recipes.base import Clips
from ..stopping import SIGNALS
from .sampler import ClipSampler, Pick


class _Picked(Dataset):
    """Clips by `Pick` instead of by index."""

    def __init__(self, clips: Clips) -> None:
        self.clips = clips

    def __getitem__(self, pick: Pick) -> tuple[Place, dict[str, Any]]:
        return pick.place, self.clips.load(pick)


def batches(
    clips: Clips, sampler: ClipSampler, process: int, steps: int, first: int, workers: int
) -> Generator[tuple[list[Place], dict[str, Any]], None, None]:
    """Places and stacked parts of the clips of each micro-batch of the steps `first` to `steps` - 1.

    A generator: closing it ends the background processes.
    """
    loader = DataLoader(
        _Picked(clips),
        batch_sampler=_Lists(sampler, process, steps, first),
        num_workers=workers,
        collate_fn=collate,
        # Without it, each iterator would take a number from the generator of the training itself.
        generator=torch.Generator().manual_seed(sampler.seed),
        worker_init_fn=_begin_worker,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    yield from loader


def collate(parts: list[tuple[Place, dict[str, Any]]]) -> tuple[list[Place], dict[str, Any]]:
    """Stack tensors, list the rest."""
    places, samples = zip(*parts, strict=True)
    batch = {}
    for name, value in samples[0].items():
        values = [sample[name] for sample in samples]
        batch[name] = torch.stack(values) if isinstance(value, torch.Tensor) else values
    return list(places), batch


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the tensors of a batch."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


class _Lists:
    """The picks of the micro-batches, for a DataLoader."""

    def __init__(self, sampler: ClipSampler, process: int, steps: int, first: int) -> None:
        self.sampler, self.process, self.steps, self.first = sampler, process, steps, first

    def __iter__(self) -> Iterator[list[Pick]]:
        return self.sampler.micro_batches(self.process, self.steps, self.first)

    def __len__(self) -> int:
        return (self.steps - self.first) * self.sampler.accumulate


def _begin_worker(_: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C, torchrun and Slurm signal the whole group: whether the run ends, and when, is for the process that trains.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
