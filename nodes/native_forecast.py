"""The forecast cache in ComfyUI's native models: steps whose noise goes on in a line are not computed.

A wrapper around ComfyUI's `calc_cond_batch` leaves all passes of such a step out and gives what they would have made of
its latents, so that any sampler and any formula of guidance goes on as before.
"""

from __future__ import annotations

import logging
import statistics
from dataclasses import replace
from typing import Any

import torch

from ..attention import StepInfo
from ..pipelines.forecast.forecasts import Forecasts
from ..pipelines.forecast.level import Level
from ..pipelines.forecast.settings import ForecastSettings
from .geometry import diffusion_model_of
from .native_guidance_cache import FORECAST as KEY
from .native_guidance_cache import KEY as GUIDANCE_CACHE
from .sampling import step_of, window_of
from .wording import InputError

logger = logging.getLogger(__name__)


def cache_steps(model: Any, settings: ForecastSettings) -> Any:
    """A clone of a MODEL with a forecast cache; the MODEL itself stays as it is.

    Args:
        model: ComfyUI's ModelPatcher. settings: of the cache.

    Raises:
        InputError: the MODEL has one already, or a guidance cache.
    """
    from comfy.patcher_extension import CallbacksMP, WrappersMP

    diffusion_model_of(model)
    if model.get_wrappers(WrappersMP.CALC_COND_BATCH, KEY):
        raise InputError("this MODEL has a forecast cache already: connect the MODEL from before the other one.")
    if model.get_wrappers(WrappersMP.CALC_COND_BATCH, GUIDANCE_CACHE):
        raise InputError(
            "this MODEL has a guidance cache, whose stand-ins would be taken for what was computed: leave one of both "
            "out. This one saves more."
        )
    cached = _Cached(settings)

    # Plain functions: older versions of ComfyUI copy the objects that they find in a model's options deeply.
    def wrapper(executor, *args, **kwargs):
        return cached.conditions(executor, *args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, wrapper)
    clone.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, lambda patcher: cached.begin())
    clone.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, lambda patcher: cached.end())
    return clone


class _Window:
    """What is known of one context window: its forecasts, and the noise levels that its calls had."""

    def __init__(self, settings: ForecastSettings) -> None:
        self.forecasts = Forecasts(replace(settings, last_steps=0))  # told by the sampler's levels
        self.calls = -1
        self.sigma: float | None = None


class _Cached:
    """One clone's: the forecasts of the sampling that runs, in each context window."""

    def __init__(self, settings: ForecastSettings) -> None:
        self._settings = settings
        self.begin()

    def begin(self) -> None:
        """A sampler starts."""
        self._windows: dict[str, _Window] = {}
        self._computed = self._forecast = 0

    def end(self) -> None:
        """A sampler ends, also by an interruption."""
        those = [window.forecasts for window in self._windows.values()]
        errors = [error for forecasts in those for error in forecasts.errors]
        refused = [error for forecasts in those for error in forecasts.refused]
        count = self._computed + self._forecast
        if errors:
            logger.info(
                "Forecast Cache: %d of %d steps were forecast. What the model makes in them is estimated to be off by "
                "%.3f of its size, %.3f at most.",
                self._forecast,
                count,
                statistics.fmean(errors),
                max(errors),
            )
        elif count > 1:
            best = f"the best forecast is estimated to be off by {min(refused):.3g}: raise" if refused else "raise"
            logger.warning("Forecast Cache: all %d steps were computed; %s tolerance, or make more steps.", count, best)
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
        sigma = float(timestep.flatten()[0])
        level = level_of(model, sigma) if sigma > 0 else None
        if levels is None or level is None or not level.noise:  # a model of pictures may mix no noise in
            return executor(model, conds, x, timestep, options, *more)
        window = self._windows.setdefault(window_of(inner), _Window(self._settings))
        if sigma != window.sigma:  # a sampler may evaluate the model between two of its levels
            window.sigma, window.calls = sigma, window.calls + 1
        number, count = step_of(sigma, levels.tolist())
        forecasts = window.forecasts
        branches = {
            place: StepInfo(0, window.calls, None, None, f"{place} of {len(conds)}")
            for place, cond in enumerate(conds)
            if cond is not None
        }
        keep = number >= count - self._settings.last_steps
        # All are asked, and none is left out beside one that is computed.
        if any([forecasts.computes(step, level.place, keep) for step in branches.values()]):
            out = executor(model, conds, x, timestep, options, *more)
            self._computed += 1
            for place, step in branches.items():
                forecasts.add(step, level.place, [level.noise_in(x, out[place])])
            return out
        self._forecast += 1
        made = [torch.zeros_like(x) for _ in conds]  # as ComfyUI gives it where there are no conditions
        for place, step in branches.items():
            (noise,) = forecasts.ahead(step, level.place)
            made[place] = level.made_of(x, noise).to(x.dtype)
        return made


def level_of(model: Any, sigma: float) -> Level:
    """How the latents of a model are mixed at a noise level, asked of what mixes them for its samplers.

    Args:
        model: ComfyUI's BaseModel. sigma: above 0.
    """
    mix = model.model_sampling.noise_scaling
    at, nothing, one = torch.tensor([sigma], dtype=torch.float64), *torch.tensor([[[0.0]], [[1.0]]]).double()
    return Level(float(mix(at, nothing.clone(), one.clone())), float(mix(at, one.clone(), nothing.clone())), "sample")
