"""Tokens that lie around a few centres, for methods that work with clusters."""

from __future__ import annotations

import torch

from vidaccel import VideoLayout

LAYOUT = VideoLayout(4, 7, 6)
WITH_TEXT = VideoLayout(4, 7, 6, text_before=3, text_after=5)
FEW = {"probe": True, "q_clusters": 6, "k_clusters": 12, "init_iterations": 4}


def clustered(layout: VideoLayout, spread: float = 0.5, seed: int = 0, dim: int = 16) -> list[torch.Tensor]:
    """q, k, v `[2, 2, N, D]` around a few centres, values that go with the keys."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 2, layout.tokens)
    centres = torch.randn(10, dim, generator=generator) * 1.5
    picks = torch.randint(0, 10, shape, generator=generator)
    noise = torch.randn(3, *shape, dim, generator=generator)
    values = torch.randn(10, dim, generator=generator)[picks.flip(2)]
    return [centres[picks] + spread * noise[0], centres[picks.flip(2)] + spread * noise[1], values + spread * noise[2]]
