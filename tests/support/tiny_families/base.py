"""What a builder gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vidaccel import VideoLayout

GRID = (3, 4, 6)  # tokens: odd frames, height and width that differ


@dataclass
class Tiny:
    """A transformer with random weights.

    Args:
        model: of a real class.
        given: arguments of its forward pass.
        layout: what its sequence is, written down by hand.
        layers: the self-attention calls over the video that are sparse in a forward pass.
        latent: the argument that holds the video.
        axes: those of frames, height and width in the latents; None where they are packed, `[B, N, C]`.
        patch: latent frames, rows and columns of a token.
        first: row of the packed latents that the video begins at.
        text: the argument whose first token is changed to see where text is; empty where it is not in the sequence.
        output: what is compared.
    """

    model: torch.nn.Module
    given: dict[str, Any]
    layout: VideoLayout
    layers: int
    latent: str = "hidden_states"
    axes: tuple[int, int, int] | None = (2, 3, 4)
    patch: tuple[int, int, int] = (1, 2, 2)
    first: int = 0
    output: Callable[[Any], torch.Tensor] = lambda out: out[0]

    @torch.no_grad()
    def run(self, **changes: Any) -> torch.Tensor:
        return self.output(self.model(**{**self.given, **changes}, return_dict=False)).clone()

    def changed(self, frame: int, row: int, column: int) -> dict[str, Any]:
        """The arguments with another content in the latents of one token."""
        latents = self.given[self.latent]
        nested = isinstance(latents, list)
        new = (latents[0] if nested else latents).clone()
        if self.axes is None:
            new[:, self.first + (frame * self.layout.height + row) * self.layout.width + column] += 5
        else:
            index: list[slice] = [slice(None)] * new.ndim
            for axis, place, size in zip(self.axes, (frame, row, column), self.patch, strict=True):
                index[axis] = slice(place * size, (place + 1) * size)
            new[tuple(index)] += 5
        return {**self.given, self.latent: [new] if nested else new}


def mask(*lengths: int, padded: int) -> torch.Tensor:
    """A padding mask `[B, padded]`."""
    return (torch.arange(padded) < torch.tensor(lengths)[:, None]).long()


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)
