"""The forecast cache in ComfyUI's native models: steps whose noise goes on in a line are not computed.

A wrapper around ComfyUI's `calc_cond_batch` leaves all passes of such a step out and gives what they would have made of
its latents, so that any sampler and any formula of guidance goes on as before.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from ...attention import StepInfo
from ...pipelines.forecast.forecasts import Forecasts
from ...pipelines.forecast.level import Level
from ...pipelines.forecast.settings import FIRST, ForecastSettings
from ..report.cache_log import CacheLog
from .caches import FORECAST, asked_of, changed, put_in
from .passes import Passes
from .sampling import step_of, window_of

logger = logging.getLogger(__name__)

MAX_TOLERANCE = 1.0  # of the node's input
WINDOWS = 8  # of context, that latents are kept of where they come and go; of those that stay, all are


def forecast_log() -> CacheLog:
    """For a report of one clone's cache."""
    return CacheLog("Forecast Cache", "no step was left out.", logger)


def cache_steps(model: Any, settings: ForecastSettings, log: CacheLog | None = None) -> Any:
    """A clone of a MODEL with a forecast cache; the MODEL itself stays as it is.

    Args:
        model: ComfyUI's ModelPatcher. settings: of the cache.
        log: of this clone alone, which is told what was done, for a report.

    Raises:
        InputError: the MODEL has one already, or a guidance cache, or a cache of ComfyUI's.
    """
    return put_in(model, FORECAST, _Cached(settings, log or forecast_log()))


class _Window:
    """What is known of one context window: its forecasts, and the calls at the noise level that it is at."""

    def __init__(self, settings: ForecastSettings) -> None:
        # Steps are those of the sampler's levels here, and these are told it by `keep`.
        self.forecasts = Forecasts(replace(settings, first_steps=0, last_steps=0))
        self.level = -1
        self._changes = 0
        self._sigma: float | None = None
        self._calls: Counter[str] = Counter()
        self._before: set[str] | None = None  # what was asked for at the level before

    def at(self, sigma: float) -> None:
        """Go to a noise level. A sampler may evaluate the model between two of its own.

        Where the last level had more passes than the one before it, or fewer, guidance has taken the latents another
        way from there on: what was seen of their noise before says little of it. A pass that another one takes the
        place of needs none of that: the other one begins a line of its own.
        """
        if sigma == self._sigma:
            return
        asked = set(self._calls)
        self._changes = self.changes()
        if self._before is not None and (asked < self._before or self._before < asked):
            self.forecasts.start_anew()
        self._sigma, self.level = sigma, self.level + 1
        self._before = asked or None
        self._calls.clear()

    def changes(self) -> int:
        """How many times what is asked for was not that of the level before, by nodes or prompts that start or stop."""
        return self._changes + (self._before is not None and set(self._calls) != self._before)

    def times(self, asked: str) -> int:
        """How many times something is asked of a model at this level, this one included: the second time it is another
        branch, such as the second evaluation of a step."""
        self._calls[asked] += 1
        return self._calls[asked]


class _Cached:
    """One clone's: the forecasts of the sampling that runs, in each context window."""

    def __init__(self, settings: ForecastSettings, log: CacheLog) -> None:
        self._settings, self._log = settings, log
        self._forget()

    def begin(self, queued: str | None = None) -> None:
        """A sampler starts, for an entry of ComfyUI's queue."""
        self._log.begin(queued)
        self._forget()

    def _forget(self) -> None:
        self._finished = False
        self._names: set[str] = set()  # of context windows
        self._moved = False  # some came that the first step had not
        self._windows: dict[str, _Window] = {}
        self._step = -1
        # Names of windows: of that step, and of the one before.
        self._now: set[str] = set()
        self._before: set[str] = set()
        self._steps: set[int] = set()
        self._count = 0  # of the sampler's steps
        # A sampler may evaluate the model more than once in a step, and in many context windows. An evaluation is told
        # by its noise level, counted from 0, by which one there it is, from 1, and by its window: prompts that come
        # apart are of the same.
        self._sigma: float | None = None
        self._level = -1
        self._passes = Passes()
        self._evaluations: set[tuple[int, int, str]] = set()
        self._computed: set[tuple[int, int, str]] = set()
        self._errors: list[float] = []
        self._refused: list[float] = []

    def finish(self) -> None:
        """A sampler has done all of its steps, and was not interrupted."""
        self._finished = True

    def end(self) -> None:
        """A sampler ends, also by an interruption."""
        for window in self._windows.values():
            self._note(window)
        left_out, count = len(self._evaluations - self._computed), len(self._evaluations)
        unit = "evaluations of context windows" if len(self._names) > 1 else "evaluations"
        unit = "steps" if count == len(self._steps) else unit
        if self._errors:
            self._log.tell(
                logging.INFO,
                f"{left_out} of {count} {unit} were left out. What the model makes in forecasts is estimated to be off "
                f"by {statistics.fmean(self._errors):.3f} of its size, {max(self._errors):.3f} at most.",
            )
        elif count > 1 and self._finished:  # of a sampling that was interrupted, that tells nothing
            asked = 1 + max(window.changes() for window in self._windows.values())
            new_noise = any(window.forecasts.new_noise() for window in self._windows.values())
            fix = _kept(self._settings, self._count) or _advice(list(filter(math.isfinite, self._refused)), new_noise)
            if self._moved:
                fix = "context windows moved from step to step, which leaves none to go on: take static ones"
            elif 2 * asked > len({place[:2] for place in self._evaluations}):
                fix = changed(asked)
            self._log.tell(logging.WARNING, f"all {count} {unit} were computed; {fix}.")
        self._forget()

    def _note(self, window: _Window) -> None:
        self._errors += window.forecasts.errors
        self._refused += window.forecasts.refused

    def _window(self, name: str, step: int) -> _Window:
        """That of a name, in a step. Known are those of this step and of the one before, which fixed ones are, and of
        others those that came last."""
        if step != self._step:
            self._step, self._before, self._now = step, self._now, set()
        self._now.add(name)
        self._moved |= step > min(self._steps, default=step) and name not in self._names
        self._names.add(name)
        window = self._windows.pop(name, None) or _Window(self._settings)
        self._windows[name] = window
        idle = [known for known in self._windows if known not in self._now | self._before]
        for known in idle[: max(0, len(self._windows) - WINDOWS)]:
            self._note(self._windows.pop(known))
        return window

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
        number, count = step_of(sigma, levels.tolist())
        name, self._count = window_of(inner), count
        window = self._window(name, number)
        window.at(sigma)
        if sigma != self._sigma:
            self._sigma, self._level = sigma, self._level + 1
        self._steps.add(number)
        given = {place: cond for place, cond in enumerate(conds) if cond is not None}
        beside = self._passes.beside(inner, sigma)
        asked = {place: asked_of(model, cond, timestep, options, beside) for place, cond in given.items()}
        times = {place: window.times(what) for place, what in asked.items()}
        branches = {
            place: StepInfo(0, window.level, None, None, f"{what}, {times[place]}") for place, what in asked.items()
        }
        evaluation = self._level, max(times.values(), default=1), name
        self._evaluations.add(evaluation)
        keep = number < self._settings.first_steps or number >= count - self._settings.last_steps
        forecasts, latents = window.forecasts, level.of_flow(x)
        # All are asked, and none is left out beside one that is computed.
        if any([forecasts.computes(step, level.place, latents, keep) for step in branches.values()]):
            out = executor(model, conds, x, timestep, options, *more)
            self._computed.add(evaluation)
            for place, step in branches.items():
                forecasts.add(step, level.place, [level.noise_in(x, out[place])], x.dtype)
            return out
        made = [torch.zeros_like(x) for _ in conds]  # as ComfyUI gives it where there are no conditions
        for place, step in branches.items():
            (noise,) = forecasts.ahead(step, level.place)
            made[place] = level.made_of(x, noise).to(x.dtype)
        return made


def _kept(settings: ForecastSettings, count: int) -> str:
    """What helps where all steps of a sampling are computed whatever is estimated; "" where some need not be.

    Args:
        settings: of the cache. count: the sampler's steps.
    """
    if not settings.keeps_all(count):
        return ""
    return (
        f"first_steps {settings.first_steps} (the first {FIRST} are, whatever it says) and last_steps "
        f"{settings.last_steps} say so: {'lower them, or ' * (count > FIRST)}make more steps"
    )


def _advice(errors: list[float], new_noise: bool) -> str:
    """What helps where no forecast was near enough.

    Args:
        errors: that forecasts are estimated to have, as far as there were any.
        new_noise: the sampler seems to add noise in each step.
    """
    if errors and min(errors) <= MAX_TOLERANCE:
        return f"the best forecast is estimated to be off by {min(errors):.3g}: raise tolerance, or make more steps"
    told = "no step went on from the ones before it"
    if errors:
        told = f"the best forecast is estimated to be off by {min(errors):.3g}, too far for any tolerance"
    if not new_noise:
        return f"{told}: make more steps"
    return (
        f"{told}: a sampler that adds noise in each step leaves no line to go on, so take euler, uni_pc or dpmpp_2m; "
        "with one of these, make more steps"
    )


def level_of(model: Any, sigma: float) -> Level:
    """How the latents of a model are mixed at a noise level, asked of what mixes them for its samplers.

    Args:
        model: ComfyUI's BaseModel. sigma: above 0.
    """
    mix = model.model_sampling.noise_scaling
    at, nothing, one = torch.tensor([sigma], dtype=torch.float64), *torch.tensor([[[0.0]], [[1.0]]]).double()
    return Level(float(mix(at, nothing.clone(), one.clone())), float(mix(at, one.clone(), nothing.clone())), "sample")
