"""Guidance without a second forward pass (GFT, arXiv 2501.15420): a LoRA and an embedding of the guidance.

The names are looked up on first use, because diffusers, on which they are built, takes seconds to import.
"""

from __future__ import annotations

import importlib

_LATER = {
    "BETA": ".beta",
    "BetaEmbedder": ".beta",
    "BetaSlot": ".beta",
    "GuidanceFree": ".handle",
    "GuidanceFreeAdapter": ".adapter_file",
    "GuidanceFreeError": ".adapter_file",
    "guidance_free": ".handle",
    "no_slot": ".beta",
    "read_adapter": ".adapter_file",
}

__all__ = sorted(_LATER)


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LATER[name], __name__), name)
    globals()[name] = value
    return value
