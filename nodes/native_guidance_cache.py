"""The guidance cache in ComfyUI's native models: the pass of the negative prompt is made in some steps only.

A wrapper around ComfyUI's `calc_cond_batch` leaves it out and gives what stands for it, so that whatever computes with
both results gets both: any formula of guidance, any sampler. Guiders with other branches than two are let through.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from ..attention import StepInfo
from ..pipelines.guidance_cache.differences import Differences
from ..pipelines.guidance_cache.settings import GuidanceCache
from .geometry import diffusion_model_of
from .native_caches import GUIDANCE, put_in
from .sampling import step_of, window_of
from .wording import InputError

logger = logging.getLogger(__name__)


def cache_guidance(model: Any, settings: GuidanceCache) -> Any:
    """A clone of a MODEL with a guidance cache; the MODEL itself stays as it is.

    Args:
        model: ComfyUI's ModelPatcher. settings: of the cache.

    Raises:
        InputError: the MODEL has one already, a forecast cache, or guidance in one pass.
    """
    from comfy.patcher_extension import WrappersMP

    from .native_guidance import KEY as ONE_PASS

    diffusion_model_of(model)
    if model.get_wrappers(WrappersMP.OUTER_SAMPLE, ONE_PASS):
        raise InputError("this MODEL is guidance-free: its steps have one pass, and there is none to leave out.")
    return put_in(model, GUIDANCE, _Cached(settings))


class _Cached:
    """One clone's: the differences of the sampling that runs, in each context window."""

    def __init__(self, settings: GuidanceCache) -> None:
        self._settings = settings
        self.begin()

    def begin(self) -> None:
        """A sampler starts."""
        self._windows: dict[str, Differences] = {}
        self._made = self._extrapolated = 0

    def end(self) -> None:
        """A sampler ends, also by an interruption."""
        if self._extrapolated:
            count = self._made + self._extrapolated
            logger.info("Guidance Cache: %d of %d passes of the negative prompt were made.", self._made, count)
        elif self._made:
            logger.warning(
                "Guidance Cache: all %d passes of the negative prompt were made: make more steps, or lower "
                "first_percent.",
                self._made,
            )
        self.begin()

    def conditions(
        self,
        executor: Any,
        model: Any,
        conds: list[Any],
        x: torch.Tensor,
        timestep: torch.Tensor,
        options: dict[str, Any],
        *more: Any,
    ) -> list[torch.Tensor]:
        """The CALC_COND_BATCH wrapper: what the model makes of each list of conditions, shaped as `x`."""
        inner = options.get("transformer_options") or {}
        levels = inner.get("sample_sigmas")
        if len(conds) != 2 or any(cond is None for cond in conds) or levels is None:
            return executor(model, conds, x, timestep, options, *more)
        sigma = float(timestep.flatten()[0])
        number, count = step_of(sigma, levels.tolist())
        step = StepInfo(0, number, count)
        differences = self._windows.setdefault(window_of(inner), Differences(self._settings))
        if sigma <= 0 or differences.wanted(step, [x.shape]):
            out = executor(model, conds, x, timestep, options, *more)
            if sigma > 0:
                self._made += 1
                positive, negative = (made / sigma for made in out)
                differences.add(step, [positive], [negative])
            return out
        self._extrapolated += 1
        # What it makes is an image, which is what it takes off the noise times the noise level.
        positive, _ = executor(model, [conds[0], None], x, timestep, options, *more)
        (stand_in,) = differences.second(step, [positive / sigma])
        return [positive, stand_in * sigma]
