"""diffusers pipelines: acceleration of the ones that exist, DC-VideoGen and DC-Gen.

The classes of the last two are looked up on first use, because diffusers' own, on which they are built, take seconds to
import.
"""

from __future__ import annotations

import importlib

from .handle import Handle, accelerate, restore
from .specs import SPECS, ModelSpec, find_transformers, supported_pipelines

_LATER = {
    "DCGenFluxPipeline": ".dc_gen",
    "DCGenPipeline": ".dc_gen",
    "DCGenSanaPipeline": ".dc_gen",
    "DCVideoGenImageToVideoPipeline": ".dc_wan_image",
    "DCVideoGenPipeline": ".dc_wan",
    "convert_repository": ".published",
}

__all__ = ["SPECS", "Handle", "ModelSpec", "accelerate", "find_transformers", "restore", "supported_pipelines", *_LATER]


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LATER[name], __name__), name)
    globals()[name] = value
    return value
