"""The hooks of diffusers on a module: caches over steps, group offloading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

GUIDANCE_CACHE_HOOK = "vidaccel_guidance_cache"
"""Name of the hook on a transformer that leaves second passes of guidance out."""
FORECAST_HOOK = "vidaccel_forecast"
"""Name of the hook on a transformer that forecasts passes."""


def hooks_of(module: nn.Module) -> Mapping[str, Any]:
    """Those on a module itself, by their names in diffusers."""
    registry = getattr(module, "_diffusers_hook", None)
    return {} if registry is None else registry.hooks
