"""diffusers pipelines in three rooms: `acceleration` and `guidance_free` of those that exist, and `deep_compression`
(DC-VideoGen, DC-Gen).

The names of the last two are looked up on first use, because diffusers' own classes take seconds to import.
"""

from __future__ import annotations

from . import deep_compression
from .acceleration import FAMILIES, Family, Handle, accelerate, find_transformers, supported_pipelines
from .undo import restore

__all__ = [
    "FAMILIES",
    "Family",
    "Handle",
    "accelerate",
    "find_transformers",
    "restore",
    "supported_pipelines",
    *deep_compression.__all__,
]


def __getattr__(name: str) -> object:
    if name not in deep_compression.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(deep_compression, name)
