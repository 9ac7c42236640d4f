"""Sparse attention in the diffusers pipelines that exist: `accelerate`, the step clock, and one row a model family."""

from __future__ import annotations

from .families import FAMILIES, Family, find_transformers, supported_pipelines
from .handle import Handle, accelerate, restore

__all__ = ["FAMILIES", "Family", "Handle", "accelerate", "find_transformers", "restore", "supported_pipelines"]
