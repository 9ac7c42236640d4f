"""diffusers pipelines: acceleration of the ones that exist, and DC-VideoGen."""

from __future__ import annotations

from .dc_wan import DCVideoGenImageToVideoPipeline, DCVideoGenPipeline
from .handle import Handle, accelerate, restore
from .specs import SPECS, ModelSpec, find_transformers, supported_pipelines

__all__ = [
    "SPECS",
    "DCVideoGenImageToVideoPipeline",
    "DCVideoGenPipeline",
    "Handle",
    "ModelSpec",
    "accelerate",
    "find_transformers",
    "restore",
    "supported_pipelines",
]
