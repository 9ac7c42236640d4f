"""What pipelines of diffusers give their scheduler for its table, and schedulers that do not take it.

diffusers finds that out in the midst of a call, after the prompt was encoded. `apply` says it before.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..few_steps.grid import GridScheduler
from ..few_steps.renoising import RenoisingScheduler
from .errors import PresetError

_SIGMAS, _SHIFTED = ("sigmas",), ("sigmas", "mu")
GIVEN: Mapping[str, tuple[str, ...]] = {
    "Cosmos2TextToImagePipeline": _SIGMAS,
    "Cosmos2VideoToWorldPipeline": _SIGMAS,
    "HeliosPipeline": _SHIFTED,
    "HunyuanSkyreelsImageToVideoPipeline": _SIGMAS,
    "HunyuanVideo15ImageToVideoPipeline": _SIGMAS,
    "HunyuanVideo15Pipeline": _SIGMAS,
    "HunyuanVideoFramepackPipeline": _SHIFTED,
    "HunyuanVideoImageToVideoPipeline": _SIGMAS,
    "HunyuanVideoPipeline": _SIGMAS,
    "LTX2ConditionPipeline": _SHIFTED,
    "LTX2DFRPipeline": _SIGMAS,
    "LTX2DFRTemporalRefinePipeline": _SIGMAS,
    "LTX2HDRPipeline": _SHIFTED,
    "LTX2ImageToVideoPipeline": _SHIFTED,
    "LTX2InContextPipeline": _SHIFTED,
    "LTX2Pipeline": _SHIFTED,
    "LTXConditionPipeline": ("timesteps",),
    "LTXImageToVideoPipeline": _SHIFTED,
    "LTXPipeline": _SHIFTED,
    "MochiPipeline": _SIGMAS,
    "MotifVideoImage2VideoPipeline": _SHIFTED,
    "MotifVideoPipeline": _SHIFTED,
}
"""Pipeline -> arguments of `set_timesteps` that it gives in each call, in diffusers 0.42."""

UNEVEN = frozenset(
    {
        "Cosmos2TextToImagePipeline",
        "Cosmos2VideoToWorldPipeline",
        "LTX2DFRPipeline",
        "LTX2DFRTemporalRefinePipeline",
        "LTXConditionPipeline",
        "MochiPipeline",
    }
)
"""Those whose steps are a choice of their own, and not evenly spaced for the scheduler to shift."""


def check_table(pipe: Any, scheduler: Any) -> None:
    """Raise PresetError where a scheduler cannot make its table from what the pipeline gives it.

    Args:
        pipe: the pipeline. scheduler: for it.
    """
    own = next((cls.__name__ for cls in type(pipe).__mro__ if cls.__name__ in GIVEN), None)
    if own is None:
        return
    name = type(scheduler).__name__
    fix = "Leave scheduler out, or take FlowMatchEulerDiscreteScheduler."
    taken = inspect.signature(scheduler.set_timesteps).parameters
    missing = [given for given in GIVEN[own] if given not in taken]
    if missing:
        problem = f"a {own} gives its scheduler {' and '.join(missing)} in each call, which a {name} does not take"
        raise PresetError("scheduler", problem, fix, value=name)
    if own in UNEVEN and isinstance(scheduler, GridScheduler | RenoisingScheduler):
        problem = f"a {own} has steps of its own, and those of a {name} are fixed"
        raise PresetError("scheduler", problem, fix, value=name)
