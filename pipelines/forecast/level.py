"""What a model's output and its latents say of the noise in them, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..acceleration.scheduler_table import MAX_FLOW_SIGMA, highest_sigma

FLOW = "flow_prediction"
OF_DIFFUSION = ("epsilon", "v_prediction", "sample")
"""What models of diffusion make, by diffusers' names (`prediction_type`)."""


@dataclass(frozen=True)
class Level:
    """How latents are mixed at a step, and what the model makes of them.

    Args:
        signal, noise: `latents = signal * video + noise * noise`.
        makes: `FLOW`, the noise less the video, or one of `OF_DIFFUSION`.
        sign: -1 where the model makes the negative of that (Mochi 1).
    """

    signal: float
    noise: float
    makes: str = FLOW
    sign: int = 1

    @property
    def place(self) -> float:
        """The share of noise, from 0 to 1: the time of a flow that mixes as this."""
        return self.noise / (self.signal + self.noise)

    def of_flow(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as a flow would mix them at the same share of noise, float32."""
        return latents.float() / (self.signal + self.noise)

    def noise_in(self, latents: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        """The noise that a model sees in latents, float32, from what it made of them."""
        latents, made = latents.float(), self.sign * made.float()
        if self.makes == FLOW:
            return latents + self.signal * made
        if self.makes == "v_prediction":
            return self.noise * latents + self.signal * made
        return made if self.makes == "epsilon" else (latents - self.signal * made) / self.noise

    def made_of(self, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What a model would make of latents in which it sees this noise, float32."""
        latents = latents.float()
        if self.makes == FLOW:
            made = (noise - latents) / self.signal
        elif self.makes == "v_prediction":
            made = (noise - self.noise * latents) / self.signal
        else:
            made = noise if self.makes == "epsilon" else (latents - self.noise * noise) / self.signal
        return self.sign * made


def tells_levels(scheduler: Any) -> bool:
    """Whether `level_of` may know those of a scheduler, as far as it shows before a run."""
    if getattr(getattr(scheduler, "config", None), "use_flow_sigmas", False):
        return True  # it holds the levels of diffusion until its timesteps are set
    highest = highest_sigma(scheduler)
    return (highest is not None and highest <= MAX_FLOW_SIGMA) or _of_diffusion(scheduler)


def _of_diffusion(scheduler: Any) -> bool:
    makes = getattr(scheduler, "config", {}).get("prediction_type")
    return getattr(scheduler, "alphas_cumprod", None) is not None and makes in OF_DIFFUSION


def level_of(scheduler: Any, sigma: float | None, timestep: float) -> Level | None:
    """That of a step; None where the scheduler does not tell it.

    Args:
        scheduler: of diffusers.
        sigma: the noise level of the step where it is a flow's, see `StepInfo`.
        timestep: of the step.
    """
    if sigma is not None:
        inverted = getattr(scheduler, "config", {}).get("invert_sigmas")
        return Level(1 - sigma, sigma, sign=-1 if inverted else 1)
    if not _of_diffusion(scheduler) or not 0 <= round(timestep) < len(scheduler.alphas_cumprod):
        return None
    share = float(scheduler.alphas_cumprod[round(timestep)])
    return Level(share**0.5, (1 - share) ** 0.5, scheduler.config.prediction_type)
