"""Flow matching: noise levels and velocities.

A noisy latent is (1 - sigma) * latent + sigma * noise; the model is given t = sigma * 1000 and predicts noise - latent.
"""

from __future__ import annotations

import torch

from .generators import Generators

TIMESTEPS = 1000
"""What a sigma of 1 is called by the models that diffusers has."""


def shifted(uniform: torch.Tensor, shift: float) -> torch.Tensor:
    """Noise levels of numbers uniform in [0, 1): `shift * u / (1 + (shift - 1) * u)`, the grid of the samplers."""
    return shift * uniform / (1 + (shift - 1) * uniform)


def sample_sigmas(
    rng: Generators, shift: float, logit_normal_share: float = 0.0, mean: float = 0.0, deviation: float = 1.0
) -> torch.Tensor:
    """A noise level for each clip, `[B]` in [0, 1), continuous. The timestep is exactly `sigma * TIMESTEPS`.

    Published training code rounds sigma to a grid of 50 but gives the model the unrounded t; here they agree.

    Args:
        rng: the random numbers.
        shift: towards noise.
        logit_normal_share: share of the levels that are logit-normal instead, with `mean` and `deviation`.
    """
    uniform = rng.stratified()
    if not logit_normal_share:
        return shifted(uniform, shift)
    normal = torch.special.ndtri((uniform / logit_normal_share).clamp(1e-4, 1 - 1e-4))
    rest = ((uniform - logit_normal_share) / max(1 - logit_normal_share, 1e-6)).clamp(0, 1 - 2**-24)
    return torch.where(uniform < logit_normal_share, torch.sigmoid(mean + deviation * normal), shifted(rest, shift))


def noisy(latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Latents `[B, ...]` at the noise levels `[B]`."""
    sigma = sigma.view(-1, *[1] * (latents.ndim - 1))
    return (1 - sigma) * latents + sigma * noise
