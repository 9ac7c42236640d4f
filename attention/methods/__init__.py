"""Sparse-attention methods. One file each; a new one is one import and one row here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from .base import Method, PlanMemory, check_config
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


def resolve_method(method: Method | str, **settings: Any) -> Method:
    """A method from a method, or by name with its default settings but for those given.

    Raises:
        ValueError: no method has that name; a setting out of its bounds. TypeError: neither a method nor a name;
            settings beside a method, or that the named one has not; a config without a name, or with another schedule
            than a `DenseSchedule`.
    """
    if isinstance(method, Method):
        if settings:
            given, cls = _written(settings), type(method).__name__
            raise TypeError(f"{given} is beside a config, which has its settings itself: give {cls}({given}).")
        check_config(method)
        return method
    if not isinstance(method, str):
        raise TypeError(f"method must be one of {', '.join(METHODS)} or a config such as SVG2(), got {method!r}.")
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose {', '.join(METHODS)}, or leave the pipeline dense.")
    check_settings(METHODS[method], settings)
    made = METHODS[method](**settings)
    check_config(made)
    return made


def check_settings(cls: type[Method], settings: Mapping[str, Any]) -> None:
    """Raise a TypeError that names those of a method where a setting is none of them."""
    names = [f.name for f in fields(cls)]
    wrong = [name for name in settings if name not in names]
    if not wrong:
        return
    told = f"{cls.name} has no setting {', '.join(map(repr, wrong))}; it has {', '.join(names)}"
    if "density" in wrong:
        # Where it follows from the geometry.
        told += f". Its density follows from the video: {cls.__name__}.for_density(VideoLayout(...), density) finds it"
    raise TypeError(f"{told}.")


def _written(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


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
    "check_config",
    "check_settings",
    "resolve_method",
]
