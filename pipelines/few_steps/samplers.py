"""The samplers of models that were distilled to few steps, told without loading them."""

from __future__ import annotations

FEW_STEPS = ("DMDScheduler", "GridScheduler", "RCMScheduler")
"""Names of their classes."""


def has_few_steps(scheduler: object) -> bool:
    """Whether a scheduler is one of them, or derived from one."""
    return any(cls.__name__ in FEW_STEPS for cls in type(scheduler).__mro__)
