"""Small calls of the methods that plan anew at each of them."""

from __future__ import annotations

import torch

from vidaccel import SVG, SVG2, Tangent, VideoLayout

LAYOUT = VideoLayout(3, 6, 6, text_after=5)
METHODS = {
    "svg": SVG(density=0.8, tile=8, profile_rows=16),
    "svg2": SVG2(density=0.5, q_clusters=4, k_clusters=9, init_iterations=2),
    "svg2, compensated": SVG2(density=0.5, compensate=True, q_clusters=4, k_clusters=9, init_iterations=2),
    "tangent": Tangent(density=0.4, probe=True, q_clusters=4, k_clusters=9, init_iterations=2),
    "tangent, probe-free": Tangent(density=0.4, probe=False, q_clusters=4, k_clusters=9, init_iterations=2),
}


def tokens(device, seed):
    """Clustered tokens that move a little from step to step."""
    generator = torch.Generator().manual_seed(0)
    centers = 2 * torch.randn(3, 1, 2, 7, 32, generator=generator)
    picks = torch.randint(0, 7, (3, 1, 2, LAYOUT.tokens, 1), generator=generator).expand(-1, -1, -1, -1, 32)
    noise = torch.randn(picks.shape, generator=generator) + 0.2 * torch.randn(
        picks.shape, generator=torch.Generator().manual_seed(seed)
    )
    return (centers.gather(3, picks) + 0.4 * noise).to(device).unbind(0)
