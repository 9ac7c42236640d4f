"""Euler steps at the noise levels that a model was distilled for.

Saved pipelines may name this module and class in their `model_index.json`, so neither may be renamed. diffusers looks
for `SchedulerMixin` in the module, too.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401 - see above

from .even_sigmas import steps_of


class GridScheduler(FlowMatchEulerDiscreteScheduler):
    """Steps of a flow model at levels of its own, in any pipeline of flow models such as Wan's.

    Args:
        sigmas: noise levels of the steps, falling from at most 1; the last step ends at 0.
        num_train_timesteps: what the model is told for a level of 1.

    Raises:
        ValueError: levels that do not fall.
    """

    @register_to_config
    def __init__(self, sigmas: Sequence[float] = (1.0, 0.9375, 5 / 6, 0.625), num_train_timesteps: int = 1000) -> None:
        super().__init__(num_train_timesteps=num_train_timesteps, shift=1.0)
        if not sigmas or sigmas[0] > 1 or any(a <= b for a, b in itertools.pairwise([*sigmas, 0.0])):
            raise ValueError(f"sigmas are {list(sigmas)}: they must fall, from at most 1 to above 0.")
        self.levels = tuple(float(sigma) for sigma in sigmas)

    @property
    def fixed_steps(self) -> int:
        """The one number of steps that it makes."""
        return len(self.levels)

    def to_json_string(self) -> str:
        """The settings as they are saved: without those of diffusers' scheduler, which follow."""
        own = {"_class_name", "_diffusers_version", "sigmas", "num_train_timesteps"}
        settings = json.loads(super().to_json_string())
        return json.dumps({name: value for name, value in settings.items() if name in own}, indent=2) + "\n"

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        **given: Any,
    ) -> None:
        """Make the table of the levels.

        Args:
            num_inference_steps: as many as there are levels. device: of the timesteps.
            sigmas: evenly spaced ones, of which only the number counts; see `even_sigmas`.
            mu: of a shift by the size of the video, which levels of their own do not have.

        Raises:
            ValueError: another number of steps than there are levels, or levels that are given.
        """
        named = [name for name, value in given.items() if value is not None]
        if named:
            raise ValueError(f"{named[0]} is given, but the noise levels are those of the training: leave it out.")
        if sigmas is not None:
            num_inference_steps = steps_of(sigmas)
        if num_inference_steps is not None and num_inference_steps != len(self.levels):
            raise ValueError(
                f"num_inference_steps is {num_inference_steps}, but the model was distilled to {len(self.levels)}: "
                "give that."
            )
        super().set_timesteps(sigmas=list(self.levels))
        # Pipelines read the level of each step, and the host would have to wait for it if that were there, too.
        self.timesteps: torch.Tensor = self.timesteps.to(device)
