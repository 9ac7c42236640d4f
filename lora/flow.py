"""Flow matching: noise levels and velocities.

A noisy latent is (1 - sigma) * latent + sigma * noise; the model is given t = sigma * 1000 and predicts noise - latent.
"""

from __future__ import annotations

import torch

from .distributed.generators import Generators

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


def sample_levels(
    rng: Generators,
    shift: float,
    density: str = "logit_normal",
    mean: float = 0.0,
    deviation: float = 1.0,
    levels: tuple[float, float] = (0.0, 1.0),
) -> torch.Tensor:
    """A noise level for each clip, `[B]`, of a density that is shifted and cut to a part of [0, 1].

    The density is that of the SD3 paper (arXiv 2403.03206, section 3.1): the numbers that are shifted are uniform, or
    sigmoids of normal ones. The clips of a step lie in as many parts of equal probability.

    Args:
        rng: the random numbers.
        shift: towards noise.
        density: "uniform" or "logit_normal", with `mean` and `deviation`.
        levels: the lowest and the highest, where a transformer is used for a part of them only.
    """
    low, high = (_before_shift(torch.tensor(level, dtype=torch.float64), shift) for level in levels)
    if density == "logit_normal":
        low, high = (torch.special.ndtr((torch.logit(level) - mean) / deviation) for level in (low, high))
    share = low + rng.stratified().double() * (high - low)
    if density == "logit_normal":
        share = torch.sigmoid(mean + deviation * torch.special.ndtri(share.clamp(1e-12, 1 - 1e-12)))
    return shifted(share, shift).clamp(*levels).float().clamp(max=1 - 2**-24)


def _before_shift(level: torch.Tensor, shift: float) -> torch.Tensor:
    """The number of which `shifted` makes a noise level."""
    return level / (shift - (shift - 1) * level)


def noisy(latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Latents `[B, ...]` at the noise levels `[B]`."""
    sigma = sigma.view(-1, *[1] * (latents.ndim - 1))
    return (1 - sigma) * latents + sigma * noise
