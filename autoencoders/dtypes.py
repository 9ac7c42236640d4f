"""Dtypes by name: diffusers takes `dtype="bfloat16"` for a slip and loads float32 with a warning."""

from __future__ import annotations

from typing import Any

import torch

_NAMES = ("float32", "bfloat16", "float16", "float64")


def resolve_dtypes(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a `from_pretrained` with names of dtypes replaced, one or one a component.

    Raises:
        ValueError: a name that is no dtype's.
    """
    resolved = dict(options)
    for argument in ("dtype", "torch_dtype"):
        value = options.get(argument)
        if isinstance(value, dict):
            resolved[argument] = {part: resolve_dtype(one, f"{argument}[{part!r}]") for part, one in value.items()}
        elif value is not None:
            resolved[argument] = resolve_dtype(value, argument)
    return resolved


def resolve_dtype(value: Any, argument: str = "dtype") -> Any:
    """A dtype that may be given by name; what is no text is what it was. Raises as `resolve_dtypes` does."""
    if not isinstance(value, str):
        return value
    name = value.removeprefix("torch.")
    if name not in _NAMES:
        raise ValueError(f"{argument}={value!r} is no dtype: give one of {', '.join(_NAMES)}, or torch's own.")
    return getattr(torch, name)


def computing_dtype(value: Any, argument: str = "dtype") -> torch.dtype | None:
    """A dtype that layers compute in, which may be given by name; None where none is given.

    Raises:
        ValueError: a name that is no dtype's, or what layers do not compute in, such as int8.
    """
    dtype = resolve_dtype(value, argument)
    if dtype is not None and dtype not in [getattr(torch, name) for name in _NAMES]:
        raise ValueError(f"{argument} is {dtype!r}, in which layers do not compute: give one of {', '.join(_NAMES)}.")
    return dtype
