"""diffusers pipelines: acceleration of the ones that exist."""

from __future__ import annotations

from .handle import Handle, accelerate, restore
from .specs import SPECS, ModelSpec, find_transformers, supported_pipelines

__all__ = ["SPECS", "Handle", "ModelSpec", "accelerate", "find_transformers", "restore", "supported_pipelines"]
