"""What caches of native models share: each is around ComfyUI's `calc_cond_batch` in a clone of a MODEL."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from .geometry import diffusion_model_of
from .wording import InputError

FORECAST = "vidaccel_forecast"
GUIDANCE = "vidaccel_guidance_cache"
NAMES = {FORECAST: "forecast cache", GUIDANCE: "guidance cache"}
"""Key of a cache in a MODEL -> what it is called."""


class NativeCache(Protocol):
    """One clone's cache."""

    def begin(self) -> None:
        """A sampler starts."""

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
        InputError: the MODEL is none, or has a cache of this package.
    """
    from comfy.patcher_extension import CallbacksMP, WrappersMP

    diffusion_model_of(model)
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
    def wrapper(executor, *args, **kwargs):
        return cache.conditions(executor, *args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, key, wrapper)
    clone.add_callback_with_key(CallbacksMP.ON_PRE_RUN, key, lambda patcher: cache.begin())
    clone.add_callback_with_key(CallbacksMP.ON_CLEANUP, key, lambda patcher: cache.end())
    return clone
