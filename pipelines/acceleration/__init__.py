"""Sparse attention in the diffusers pipelines that exist: `accelerate`, the step clock, and one row a model family."""

from __future__ import annotations

from .families import SPECS, ModelSpec, find_transformers, supported_pipelines
from .handle import Handle, accelerate, restore

__all__ = ["SPECS", "Handle", "ModelSpec", "accelerate", "find_transformers", "restore", "supported_pipelines"]
