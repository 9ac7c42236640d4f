"""What MagCache must know of a model: how the residual of each step compares with that of the one before."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import MagCacheConfig

from ..acceleration.clock import StepClock
from ..acceleration.families import Family, find_transformers
from ..guidance_cache.passes import LeftOutPasses
from ..guidance_cache.samples import LeftOutSamples
from ..hooks.hooked import is_hooked
from .errors import PresetError
from .levers import Cache
from .loops import mend_loop

_ANY = {"mag_ratios": [1.0]}  # `check_cache` asks for some


def measure_mag_ratios(pipe: Any, call: Callable[[], Any]) -> list[float]:
    """The ratios that `Cache("magcache", settings={"mag_ratios": ...})` needs, from one run with nothing skipped.

    Args:
        pipe: the pipeline, with the scheduler, the LoRAs and the guidance that it will have.
        call: runs it once, at the size and with the steps that it will have.

    Returns:
        One for each step, of the branch with the text.

    Raises:
        PresetError: its transformer cannot have the cache, or has another one, or a guidance cache; or the run had no
            step, or was several.
    """
    from .caches import check_cache, leader_of

    parts = find_transformers(pipe)
    clock, runs = StepClock(pipe, logs=False), set[int]()
    transformer: Any
    for name, (transformer, family) in parts.items():
        check_cache(name, transformer, len(family.modules(transformer)), Cache("magcache", settings=_ANY))
        if is_hooked(transformer, LeftOutPasses, LeftOutSamples):
            problem = f"the {name} has a guidance cache, beside which not all passes are computed"
            raise PresetError("cache", problem, "Call remove() on its handle, or vidaccel.restore(pipe), first.")
    found: list[float] = []
    undo: list[Callable[[], None]] = []
    try:
        for name, (transformer, family) in parts.items():
            # More steps than any run has, so that it forgets nothing at the end of one.
            transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=1_000_000))
            undo.append(transformer.disable_cache)
            hook = leader_of(transformer, "mag_cache_leader_block_hook")
            mend_loop(transformer, hook, "head_block_input")  # what the cache will keep is what is measured

            def begins(
                module: Any, args: tuple, kwargs: dict[str, Any], name: str = name, family: Family = family
            ) -> None:
                given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
                timestep = torch.as_tensor(given[family.timestep])
                runs.add(clock.observe(timestep, name, family.branches).run)

            def passed(*_: Any, hook: Any = hook, first: str = family.branches[0]) -> None:
                clock.passed()
                context = hook.state_manager._context
                if context is None or context.name in (first, "cond", "inference"):
                    found.append(hook.state_manager.get_state().calibration_ratios[-1])

            undo.append(transformer.register_forward_pre_hook(begins, with_kwargs=True).remove)
            undo.append(transformer.register_forward_hook(passed).remove)
        call()
    finally:
        for each in reversed(undo):
            each()
    if not found:
        raise PresetError("cache", "the run had no step to measure")
    if len(runs) > 1:
        problem = f"{len(runs)} runs were made, and the ratios are those of the steps of one"
        raise PresetError("cache", problem, "Have call make one video, in one go.")
    return [round(float(ratio), 5) for ratio in found]
