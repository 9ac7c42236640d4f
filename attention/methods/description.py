"""A method as plain data, for the headers of files and for presets, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from ..schedule import DenseSchedule

if TYPE_CHECKING:
    from .base import Method


def describe(method: Method) -> dict[str, Any]:
    """Its name, all its settings and its schedule, of which `described` makes the same again."""
    settings = {f.name: getattr(method, f.name) for f in fields(method) if f.name != "schedule"}
    return {"method": method.name, "settings": settings, "schedule": asdict(method.schedule)}


def in_words(method: Method) -> str:
    """Its name and the amount of work that it was given, such as `tangent density 0.2`."""
    amount = {name: getattr(method, name, None) for name in ("density", "tolerance", "topk", "cdf", "decay", "top_p")}
    told = [f"{k} {v:.3g}" for k, v in amount.items() if isinstance(v, int | float)]
    return " ".join([method.name, *told[:1]])  # a density of SVG2 stands in place of its top_p


def described(stated: Mapping[str, Any]) -> Method:
    """The method of a description.

    Args:
        stated: with `method`; without `settings`, or some of them, those have their defaults, and so has the schedule.

    Raises:
        ValueError: a method that there is not, a setting that it lacks, or a value that it refuses.
        TypeError: a value of another kind.
    """
    from . import METHODS

    name = stated["method"]
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}: choose one of {', '.join(METHODS)}.")
    # A config is hashable, and files have lists alone.
    settings: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in dict(stated.get("settings") or {}).items()
    }
    known = [f.name for f in fields(METHODS[name]) if f.name != "schedule"]
    unknown = [setting for setting in settings if setting not in known]
    if unknown:
        raise ValueError(f"{name} has no setting {unknown[0]}; it has {', '.join(known)}.")
    schedule = stated.get("schedule")
    if schedule is not None:
        known = [f.name for f in fields(DenseSchedule)]
        unknown = [setting for setting in schedule if setting not in known]
        if unknown:
            raise ValueError(f"a schedule has no {unknown[0]}; it has {', '.join(known)}.")
        settings["schedule"] = DenseSchedule(**schedule)
    return METHODS[name](**settings)
