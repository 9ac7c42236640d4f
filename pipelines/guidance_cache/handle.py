"""`guidance_cache`: a pipeline that leaves second passes of guidance out, removable without a trace."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ...attention import DenseSchedule, StepInfo
from ..acceleration.clock import StepClock
from ..acceleration.copies import CopiedNotPickled
from ..acceleration.families import Family, find_transformers
from ..acceleration.left_out import has_cache
from ..cfg_parallel.passes import SplitPasses
from ..cfg_parallel.samples import SplitBatch
from ..guidance_branches import TWO, StepIsGuided, apart_from_caches, check_branches, check_not_compiled
from ..hooks.hooked import HookedPipeline, is_hooked
from ..hooks.running_pipeline import running_pipeline
from ..hooks.undo import CFG_PARALLEL, GUIDANCE_CACHE, GUIDANCE_FREE
from .differences import Differences
from .passes import LeftOutPasses
from .samples import LeftOutSamples
from .settings import GuidanceCache


class CachedGuidance(HookedPipeline[LeftOutPasses | LeftOutSamples]):
    """Second passes left out of a pipeline. Made by `guidance_cache`; a context manager that removes itself."""

    attribute = GUIDANCE_CACHE
    function = "guidance_cache"
    without = "makes all passes"

    def __init__(
        self,
        pipe: Any,
        settings: GuidanceCache,
        logs: bool = True,
        by: str = function,
        dense: DenseSchedule | None = None,
    ) -> None:
        transformers = check_guidance_cache(pipe)
        self.settings, self._logs = settings, logs
        hooked: dict[str, tuple[torch.nn.Module, LeftOutPasses | LeftOutSamples]] = {}
        self._guided = {name: _Guided(pipe) for name in transformers}
        self._differences = {name: Differences(settings, dense) for name in transformers}
        clock = StepClock(pipe, logs)
        for name, (transformer, family) in transformers.items():
            place, differences = _Place(clock, name, transformer, family), self._differences[name]
            hook: LeftOutPasses | LeftOutSamples
            if family.branches == TWO:
                hook = LeftOutPasses(name, by, place, differences)
            else:
                hook = LeftOutSamples(place, family.branches[0], self._guided[name], differences)
            hooked[name] = (transformer, hook)
        super().__init__(pipe, hooked)

    def notes(self) -> list[str]:
        """Of each transformer, how many second passes were computed since the start."""
        found = self._replaced()
        for name, (_, hook) in self._hooked.items():
            steps = hook.made + hook.extrapolated + hook.skipped
            unknown = self._guided[name].notes(name)
            found += [f"guidance cache: {note}" for note in unknown]
            if hook.unlike:
                found.append(
                    f"guidance cache: {hook.unlike} passes of the {name} were made outside of a call of the pipeline, "
                    "of two videos and not two branches of one: they were computed in full"
                )
            if not steps and not unknown and not hook.unlike:
                what = "had two branches of guidance" if hook.steps else "was made"
                found.append(f"guidance cache: no step of the {name} {what}")
            elif uncounted := self._differences[name].uncounted:
                found.append(
                    f"guidance cache: {uncounted} of {steps} steps of the {name} made both passes of guidance, because "
                    f"first_steps={self.settings.first_steps} is a fraction of a run, and outside of calls of the "
                    "pipeline, with another scheduler than its own, it is not known how many steps that has: give a "
                    "whole number of first_steps"
                )
            elif hook.made and hook.made == steps:
                found.append(f"guidance cache: {self._all_made(name, steps, hook.steps)}")
            elif steps:
                told = f"guidance cache: the {name} made {hook.made} of {steps} second passes of guidance"
                if hook.skipped:
                    told += f", and a cache over steps left out {hook.skipped}"
                found.append(told)
        return found

    def _all_made(self, name: str, guided: int, steps: int) -> str:
        """What to say where all second passes were made, of `guided` of the `steps` of a transformer."""
        asked = self.settings.first_steps
        can_fall = asked > 0 if isinstance(asked, float) else asked > 2  # two make both, whatever it says
        if guided < steps:
            fix = "lower first_steps" if can_fall and guided > 2 else "they are too few for one to be left out"
            return f"guidance was at work in {guided} of {steps} steps of the {name}, which made both passes: {fix}"
        fewer = ", or lower first_steps" if can_fall else ""
        if self._differences[name].kept_dense:
            fewer += ", or keep fewer of them dense"
        return f"all {steps} steps of the {name} made both passes of guidance: make more steps{fewer}"

    def _replaced(self) -> list[str]:
        return super()._replaced() if self._logs else []  # else the preset tells it

    def reset(self) -> None:
        """Count from here."""
        for _, hook in self._hooked.values():
            hook.made = hook.extrapolated = hook.skipped = hook.unlike = hook.steps = 0
        for guided in self._guided.values():
            guided.forget()
        for differences in self._differences.values():
            differences.uncounted = differences.kept_dense = 0

    def __repr__(self) -> str:
        return f"<vidaccel guidance cache: {self.settings if self._active else 'removed'}>"


def guidance_cache(pipe: Any, settings: GuidanceCache | int | None = None, **others: Any) -> CachedGuidance:
    """Make the second pass of classifier-free guidance in some steps only, and extrapolate its difference to the first
    one in the others: of 20 steps with both passes, 29 passes instead of 40 by default.

    Needs no training, and no other prompt, scheduler or guidance scale. Works with `accelerate`, in either order, with
    caches over steps (put on before it) and with layers in 8 bits. Where there is no second pass, as with
    `guidance_free` or a guidance scale of 1, there is nothing to leave out.

    Args:
        pipe: a diffusers pipeline of a known family (`FAMILIES`) whose step has two passes, or both in a batch.
        settings: a `GuidanceCache`, or its `every`; None for the defaults.
        others: settings of `GuidanceCache` by name, instead of one.

    Returns:
        A handle with `notes()`, `reset()` and `remove()`.

    Raises:
        TypeError: no transformer of the pipeline is known, or its steps have other branches than two of guidance.
        ValueError: a setting out of its bounds.
        RuntimeError: the pipeline, or another one that shares a transformer, has one already, or shares its passes with
            another process; guidance in one pass; a cache over steps, where both branches are in a batch; a transformer
            that was compiled as a whole. Later, in calls: a hook that came after this one.
    """
    if isinstance(settings, GuidanceCache):
        if others:
            raise TypeError(f"guidance_cache has a GuidanceCache and {', '.join(others)} beside it: give one of both.")
        return CachedGuidance(pipe, settings)
    given = {} if settings is None else {"every": settings}
    return CachedGuidance(pipe, GuidanceCache(**given, **others))


def check_guidance_cache(pipe: Any) -> dict[str, tuple[Any, Family]]:
    """The transformers of a pipeline that can leave passes out, each with its family; raises as `guidance_cache`."""
    kind = type(pipe).__name__
    if hasattr(pipe, GUIDANCE_CACHE):
        raise RuntimeError(f"this {kind} has a guidance cache already: call remove() on the first handle.")
    if hasattr(pipe, GUIDANCE_FREE):
        raise RuntimeError(f"this {kind} is guidance-free: its steps have one pass, and there is none to leave out.")
    predictions = getattr(getattr(pipe, "guider", None), "_input_predictions", None)
    if predictions is not None and list(predictions) != ["pred_cond", "pred_uncond"]:
        raise TypeError(
            f"the guider of this {kind}, a {type(pipe.guider).__name__}, has other branches than two of guidance: "
            f"{', '.join(predictions)}."
        )
    transformers = find_transformers(pipe)
    parts = [transformer for transformer, _ in transformers.values()]
    if hasattr(pipe, CFG_PARALLEL) or any(is_hooked(part, SplitPasses, SplitBatch) for part in parts):
        raise RuntimeError(
            f"this {kind} shares its passes with another process (cfg_parallel), which would have nothing to do in "
            "steps without a second one: call remove() on that handle, or leave the guidance cache out."
        )
    for name, (transformer, family) in transformers.items():
        if is_hooked(transformer, LeftOutPasses, LeftOutSamples):
            raise RuntimeError(
                f"the {name} of this {kind} has a guidance cache already, of another pipeline that shares it: this one "
                "has it with it, or call remove() on its handle, or vidaccel.restore(pipe), first."
            )
        check_branches(kind, family)
        if has_cache(transformer) and (why := apart_from_caches({name: (transformer, family)}, "a cache over steps")):
            raise RuntimeError(f"{why}. Take out the one that the {name} has, or leave the guidance cache out.")
        check_not_compiled(pipe, name, transformer, "which of its passes are made is decided outside of it")
    return transformers


class _Place(CopiedNotPickled):
    """Tells the step of a pass from its arguments.

    Args:
        clock: of the pipeline, one for all its transformers.
        name: of the transformer there. transformer: without what wraps it. family: of it.
    """

    def __init__(self, clock: StepClock, name: str, transformer: Any, family: Family) -> None:
        self._clock, self._name, self._family = clock, name, family
        self._signature = inspect.signature(type(transformer).forward)

    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> StepInfo:
        self._clock.enter(module, self._name)
        given = self._signature.bind(module, *args, **kwargs).arguments
        return self._clock.observe(torch.as_tensor(given[self._family.timestep]), self._name, self._family.branches)


class _Guided(CopiedNotPickled):
    """Whether a step has both branches of guidance in its batch, as the pipeline says whose call it is of.

    Some pipelines decide that before their first step, by the guidance scale, and change the scale later.
    """

    def __init__(self, pipe: Any) -> None:
        self._asked = StepIsGuided(pipe)
        self._run, self._guided = -1, False

    def __call__(self, step: StepInfo) -> bool:
        return self._asked(lambda pipe: self._by_scale(pipe, step.run))

    def _by_scale(self, pipe: Any, run: int) -> bool:
        if run != self._run:
            # Outside of calls, an AttributeError says that it is not known.
            scale = pipe.guidance_scale if running_pipeline() is None else getattr(pipe, "guidance_scale", 1.0)
            self._run, self._guided = run, scale > 1.0
        return self._guided

    def notes(self, name: str) -> list[str]:
        """See `StepIsGuided.notes`."""
        return self._asked.notes(name)

    def forget(self) -> None:
        """Count from here."""
        self._asked.unknown = 0
