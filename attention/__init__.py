"""Sparse attention for video sequences: methods make a `BlockPlan`, backends compute from it. Needs torch alone."""

from __future__ import annotations

from .account.records import CallRecord, RunReport
from .backends import BACKENDS, Backend, Capability
from .engine import SparseAttention
from .functional import sparse_attention
from .layout import VideoLayout
from .merge import merge
from .methods import (
    LVSA,
    METHODS,
    SLA,
    SVG,
    SVG2,
    VSA,
    Method,
    PlanMemory,
    Radial,
    RandomBlocks,
    Sparge,
    Tangent,
    resolve_method,
)
from .plan import BlockPlan
from .schedule import DenseSchedule, StepInfo

__all__ = [
    "BACKENDS",
    "LVSA",
    "METHODS",
    "SLA",
    "SVG",
    "SVG2",
    "VSA",
    "Backend",
    "BlockPlan",
    "CallRecord",
    "Capability",
    "DenseSchedule",
    "Method",
    "PlanMemory",
    "Radial",
    "RandomBlocks",
    "RunReport",
    "Sparge",
    "SparseAttention",
    "StepInfo",
    "Tangent",
    "VideoLayout",
    "merge",
    "resolve_method",
    "sparse_attention",
]
