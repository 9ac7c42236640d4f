"""Sparse-attention methods. One file each; a new one is one import and one row here."""

from __future__ import annotations

from .base import Method, PlanMemory
from .lvsa import LVSA
from .radial import Radial
from .random import RandomBlocks
from .sla import SLA
from .sparge import Sparge
from .svg import SVG
from .svg2 import SVG2
from .tangent import Tangent
from .vsa import VSA

METHODS: dict[str, type[Method]] = {
    cls.name: cls for cls in (Radial, SVG, SVG2, Tangent, Sparge, SLA, VSA, LVSA, RandomBlocks)
}


def resolve_method(method: Method | str) -> Method:
    """A method from a method, or by name with its default settings.

    Raises:
        ValueError: no method has that name. TypeError: neither a method nor a name.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise TypeError(f"method must be one of {', '.join(METHODS)} or a config such as SVG2(), got {method!r}.")
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose {', '.join(METHODS)}, or leave the pipeline dense.")
    return METHODS[method]()


__all__ = [
    "LVSA",
    "METHODS",
    "SLA",
    "SVG",
    "SVG2",
    "VSA",
    "Method",
    "PlanMemory",
    "Radial",
    "RandomBlocks",
    "Sparge",
    "Tangent",
    "resolve_method",
]
