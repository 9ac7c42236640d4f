"""Random numbers of a training step that do not depend on how its clips are spread over processes and micro-steps."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch


def derive_seed(*parts: int | str) -> int:
    """A seed from others, below 2^63; the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class Place:
    """Where a clip stands in training.

    Args:
        step: optimiser step of the phase.
        number: place among the clips of that step, over all processes.
        count: clips of that step.
        seed: its own.
    """

    step: int
    number: int
    count: int
    seed: int


class Generators:
    """Random numbers for the clips of a batch: each clip draws from a generator of its own.

    Args:
        places: one a clip.
        device: where the numbers go; they are always drawn on the CPU, so that they do not depend on it.
    """

    def __init__(self, places: Sequence[Place], device: torch.device | str = "cpu") -> None:
        self.places = tuple(places)
        self.device = torch.device(device)
        self._generators = [torch.Generator().manual_seed(place.seed) for place in self.places]

    def __len__(self) -> int:
        return len(self.places)

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal `[B, *shape]` in float32."""
        return torch.stack([torch.randn(shape, generator=g, device="cpu") for g in self._generators]).to(self.device)

    def uniform(self) -> torch.Tensor:
        """Uniform `[B]` in [0, 1), in float32."""
        return torch.cat([torch.rand(1, generator=g, device="cpu") for g in self._generators]).to(self.device)

    def stratified(self) -> torch.Tensor:
        """Uniform `[B]` in [0, 1), one number in each of as many equal parts as the step has clips."""
        numbers = torch.tensor([place.number / place.count for place in self.places], device="cpu")
        counts = torch.tensor([float(place.count) for place in self.places], device="cpu")
        return (numbers + self.uniform().cpu() / counts).clamp(max=1 - 2**-24).to(self.device)
