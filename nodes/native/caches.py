"""What caches of native models share: each is around ComfyUI's `calc_cond_batch` in a clone of a MODEL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch

from ..report.wording import InputError
from .geometry import diffusion_model_of
from .patch import queue_entry
from .sampling import replaced_blocks

FORECAST = "vidaccel_forecast"
GUIDANCE = "vidaccel_guidance_cache"
NAMES = {FORECAST: "forecast cache", GUIDANCE: "guidance cache"}
"""Key of a cache in a MODEL -> what it is called."""
_COMFYUIS = "easycache"
"""In `transformer_options`: ComfyUI's EasyCache or LazyCache, which both are there while they are in a MODEL."""


class NativeCache(Protocol):
    """One clone's cache."""

    def begin(self, queued: str | None = None) -> None:
        """A sampler starts, for an entry of ComfyUI's queue; None where nobody says which."""

    def finish(self) -> None:
        """A sampler has done all of its steps, and was not interrupted."""

    def end(self) -> None:
        """A sampler ends, also by an interruption."""

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


def put_in(model: Any, key: str, cache: NativeCache) -> Any:
    """A clone of a MODEL with a cache; the MODEL itself stays as it is.

    Args:
        model: ComfyUI's ModelPatcher. key: of `NAMES`. cache: of the clone alone.

    Raises:
        InputError: the MODEL is none, or has a cache of this package or of ComfyUI's. While it samples, likewise: nodes
            for ComfyUI's may come behind this one.
    """
    from comfy.patcher_extension import CallbacksMP, WrappersMP

    diffusion_model_of(model)
    _check_alone(key, model.model_options.get("transformer_options"))
    for there, name in NAMES.items():
        if not model.get_wrappers(WrappersMP.CALC_COND_BATCH, there):
            continue
        if there == key:
            raise InputError(f"this MODEL has a {name} already: connect the MODEL from before the other one.")
        raise InputError(
            f"this MODEL has a {name}, and what one of the two gives for a pass would be taken for computed by the "
            "other: leave one out. The forecast cache saves more."
        )

    # Plain functions: older versions of ComfyUI copy the objects that they find in a model's options deeply.
    def wrapper(executor, model, conds, x, timestep, options, *more):
        _check_alone(key, options.get("transformer_options"))
        return cache.conditions(executor, model, conds, x, timestep, options, *more)

    # Samplers may have no evaluation in their last step, so an interruption is not told by the steps.
    def sampler_wrapper(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        cache.finish()
        return out

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, key, wrapper)
    clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, key, sampler_wrapper)
    clone.add_callback_with_key(CallbacksMP.ON_PRE_RUN, key, lambda patcher: cache.begin(queue_entry()))
    clone.add_callback_with_key(CallbacksMP.ON_CLEANUP, key, lambda patcher: cache.end())
    return clone


def _check_alone(key: str, options: Mapping[str, Any] | None) -> None:
    """Raise InputError where `transformer_options` have a cache of ComfyUI's."""
    found = (options or {}).get(_COMFYUIS)
    if found is not None:
        name = getattr(found, "name", "EasyCache")
        raise InputError(
            f"this MODEL has a {NAMES[key]} and {name}, and what one of the two gives for a pass would be taken for "
            "computed by the other: leave one of them out."
        )


def changed(asked: int) -> str:
    """Why nothing was left out where what is asked of the model seldom stays the same, and what helps.

    Args:
        asked: how many different things were, 2 or more.
    """
    times = "once" if asked == 2 else f"{asked - 1} times"
    return (
        f"a ControlNet, a hook, a prompt or a node of guidance changed {times}, which leaves too few steps alike to go "
        "on: make more steps, or change it less often"
    )


def asked_of(
    model: Any, cond: list[dict[str, Any]], timestep: torch.Tensor, options: dict[str, Any], differing: str = ""
) -> str:
    """What tells a pass from others at a noise level: the model, the conditions as far as they are for this level with
    what is given in them and at work there, and the blocks that are left out or computed in another way.

    Args:
        model: ComfyUI's BaseModel. cond: conditions of the pass. timestep: `[B]`, the level. options: of the model.
        differing: in what else it differs from the others at the level, see `Passes`.
    """
    level = timestep.flatten()[:1].cpu()  # compared as a tensor, since ComfyUI rounds bounds to its precision

    def within(starts: Any, ends: Any) -> bool:
        return (starts is None or not level > float(starts)) and (ends is None or not level < float(ends))

    asked = []
    for entry in cond:
        if within(entry.get("timestep_start"), entry.get("timestep_end")):
            given = sorted(entry.get("model_conds") or ())
            at_work = _at_work(model, entry, timestep, options, within)
            asked.append(" ".join([str(entry.get("uuid")), *given, *at_work]))
    replaced = ", ".join(sorted(map(str, replaced_blocks(options.get("transformer_options") or {}))))
    beside = (f"; {replaced} replaced" if replaced else "") + (f"; {differing}" if differing else "")
    return f"{id(model)}: {', '.join(asked)}{beside}"


def _at_work(
    model: Any,
    entry: Mapping[str, Any],
    timestep: torch.Tensor,
    options: dict[str, Any],
    within: Callable[[Any, Any], bool],
) -> Iterator[str]:
    """What of a condition comes and goes on the way: its ControlNets, and the strengths of its hooks."""
    control, place = entry.get("control"), 0
    while control is not None:
        if within(*(control.timestep_range or (None, None))):  # known once its sampling begins
            yield f"control {place}"
        control, place = control.previous_controlnet, place + 1
    hooks = entry.get("hooks")
    if hooks is not None:
        # As ComfyUI does before a pass, which does nothing the second time at a level: hooks go on in steps that are
        # left out, too.
        model.current_patcher.prepare_hook_patches_current_keyframe(timestep, hooks, options)
        yield from (f"hook {hook.hook_keyframe.strength}" for hook in hooks.hooks)
