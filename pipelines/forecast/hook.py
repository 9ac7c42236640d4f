"""The forecast cache at work in a transformer of diffusers."""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.hooks import HookRegistry, ModelHook

from ...attention import StepInfo
from ...attention.account.records import call_of
from ..acceleration.clock import StepClock
from ..acceleration.scheduler_table import Timestep
from ..guidance_branches import tensors_in, with_tensors
from ..hooks.beside_hooks import beside_hooks
from ..hooks.diffusers_hooks import FORECAST_HOOK
from .forecasts import Forecasts
from .level import Level, level_of, tells_levels

LATENTS = ("hidden_states", "audio_hidden_states")
"""Arguments of forward passes, in the order of what is made of them."""


class Forecast(ModelHook):
    """Computes a pass, or gives what the forecast noise makes of its latents. A `CacheAtWork`.

    Args:
        name: of the transformer in its pipeline. transformer: without what wraps it.
        timestep: the argument of its forward pass that changes from step to step.
        clock: of the pipeline, which knows its scheduler.
        forecasts: which passes, and by what.
    """

    one_context: ClassVar[bool] = False

    def __init__(self, name: str, transformer: Any, timestep: str, clock: StepClock, forecasts: Forecasts) -> None:
        super().__init__()
        self._transformer: Any = transformer
        self._name, self._timestep, self._clock, self._forecasts = name, timestep, clock, forecasts
        self._signature = inspect.signature(type(transformer).forward)
        self._step, self._keep, self._why = StepInfo(), False, ""
        # Branch -> what a computed pass gave, without its numbers, and the shapes of what it was given.
        self._forms: dict[str, tuple[Any, list[torch.Size]]] = {}
        # Of the call of the pipeline that goes on: its runs, and the estimated errors of those before this one.
        self._call, self._runs = -1, 0
        self._errors: list[float] = []
        self._given: tuple[Level, list[torch.Tensor]] | None = None  # of the pass that is computed
        self.left_out = False
        """Whether the last pass was."""
        HookRegistry.check_if_exists_or_initialize(transformer).register_hook(self, FORECAST_HOOK)
        clock.forgets(name, self.let_go)

    def begin(self, steps: int | None) -> None:
        """See `CacheAtWork`."""
        self._errors += self._forecasts.errors
        self._runs += 1
        self._forecasts.begin()
        self._forms, self._why = {}, ""

    def enter(self, step: StepInfo, keep: bool) -> None:
        """See `CacheAtWork`."""
        if call_of(step) != self._call:
            self._call, self._errors, self._runs = call_of(step), [], 1
        self._step, self._keep, self.left_out = step, keep, False

    def notes(self) -> list[str]:
        """Why nothing could be forecast, or how far off the forecasts of the last call are estimated to be."""
        errors = [*self._errors, *self._forecasts.errors]
        if self._why and not errors:
            return [f"forecast: every step of the {self._name} was computed, because {self._why}"]
        if not errors:
            known = [error for error in self._forecasts.refused if math.isfinite(error)]
            best = f"forecast: the best one for the {self._name} is estimated to be off by"
            return [f"{best} {min(known):.3g}"] if known else []
        mean, most = statistics.fmean(errors), max(errors)
        where = "the last run" if self._runs == 1 else f"the {self._runs} runs of the last call"
        return [
            f"forecast: {len(errors)} steps of the {self._name} in {where}; what it makes in them is estimated to be "
            f"off by {mean:.3f} of its size, {most:.3f} at most"
        ]

    def agree_by(self, agree: Callable[[float, torch.device], float] | None) -> None:
        """Have it decide with another process, see `Forecasts.agree`; None for alone."""
        self._forecasts.agree = agree

    @property
    def could_not(self) -> bool:
        """Whether no step of the last run could be forecast, whatever the threshold."""
        return bool(self._why)

    def let_go(self) -> None:
        """Of all tensors: the transformer makes no more passes in this run, and others have need of the memory."""
        self._forecasts.let_go()
        self._forms, self._given = {}, None

    def remove(self) -> None:
        """Take it out. A second call does nothing."""
        if self._transformer is not None:
            with beside_hooks(self._transformer):
                registry = HookRegistry.check_if_exists_or_initialize(self._transformer)
                registry.remove_hook(FORECAST_HOOK, recurse=False)
        self._transformer = None
        self.let_go()

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The pass, or what stands for it. What decides is not compiled where the pass is."""
        stand_in = self._stand_in(module, args, kwargs)
        if stand_in is not None:
            return stand_in
        made = self.fn_ref.original_forward(*args, **kwargs)
        self._learn(made)
        return made

    @torch.compiler.disable
    def _stand_in(self, module: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """What stands for a pass; None where it has to be computed."""
        self._given = None
        if torch.is_grad_enabled():
            return None
        step, given = self._step, self._signature.bind(module, *args, **kwargs).arguments
        level, latents = self._level(step, given), _latents(given)
        if level is None or not latents:
            return None
        form, shapes = self._forms.get(step.branch, (None, []))
        keep = self._keep or [x.shape for x in latents] != shapes
        if self._forecasts.computes(step, level.place, level.of_flow(latents[0]), keep):
            self._given = level, latents
            return None
        self.left_out = True
        pairs, noises = _pairs(latents, tensors_in(form)), self._forecasts.ahead(step, level.place)
        ahead = [level.made_of(x, noise).to(out.dtype) for (x, out), noise in zip(pairs, noises, strict=True)]
        return with_tensors(form, ahead)

    def _level(self, step: StepInfo, given: Mapping[str, Any]) -> Level | None:
        timestep = None if step.sigma is not None else Timestep.of(torch.as_tensor(given[self._timestep]))
        if timestep is not None and timestep.per_frame and timestep.high != timestep.low:
            self._why = "its frames have noise levels of their own"
            return None
        scheduler = self._clock.scheduler
        level = level_of(scheduler, step.sigma, 0.0 if timestep is None else timestep.value)
        if level is None and step.num_steps is None and scheduler is not None and tells_levels(scheduler):
            self._why = "it was called outside of calls of the pipeline, with another scheduler than its own"
        elif level is None:
            self._why = "the scheduler does not tell how much noise is in a step"
        return level

    @torch.compiler.disable
    def _learn(self, made: Any) -> None:
        """Take what a computed pass made."""
        if self._given is None:
            return
        (level, latents), self._given = self._given, None
        pairs = _pairs(latents, tensors_in(made))
        if not pairs:
            self._why = "what it makes does not have the shape of its latents"
            return
        noise, dtype = [level.noise_in(x, out) for x, out in pairs], latents[0].dtype
        self._forecasts.add(self._step, level.place, noise, dtype)
        form = with_tensors(made, [x.to("meta") for x in tensors_in(made)])
        self._forms[self._step.branch] = form, [x.shape for x in latents]


def reads_latents(transformer: Any) -> bool:
    """Whether a forward pass names the latents that it works on."""
    return LATENTS[0] in inspect.signature(type(transformer).forward).parameters


def _latents(given: Mapping[str, Any]) -> list[torch.Tensor]:
    """Those of the arguments of a forward pass."""
    return [given[name] for name in LATENTS if isinstance(given.get(name), torch.Tensor)]


def _pairs(latents: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What a pass made, each behind the latents that it was made of; empty where they do not fit.

    Conditions in further channels come after the latents.
    """
    if len(latents) != len(made):
        return []
    pairs = []
    for x, out in zip(latents, made, strict=True):
        if x.ndim != out.ndim:
            return []
        other = [dim for dim in range(x.ndim) if x.shape[dim] != out.shape[dim]]
        if len(other) > 1 or any(x.shape[dim] < out.shape[dim] for dim in other):
            return []
        pairs.append((x.narrow(other[0], 0, out.shape[other[0]]) if other else x, out))
    return pairs
