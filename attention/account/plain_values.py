"""Values of any kind in those that JSON has, for reports and files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch


def plain(value: Any) -> Any:
    """A value in kinds that JSON and YAML have: tensors, arrays and tuples are lists, and a dataclass is its fields.

    NaN and infinity, for which JSON has no number, are None; what is of another kind is told as text.
    """
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(each) for each in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    return str(value)


def of_python(value: object) -> str:
    """What to do where a number is refused because it is one of numpy or torch, as the end of a message; else empty."""
    foreign = callable(getattr(value, "item", None)) and not isinstance(value, int | float)
    return f" It is a {type(value).__name__}: give a number of Python, as its item() is." if foreign else ""
