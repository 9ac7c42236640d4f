"""Guidance without a second forward pass (GFT, arXiv 2501.15420): a LoRA and an embedding of the guidance.

The names are looked up on first use, because diffusers, on which they are built, takes seconds to import.
"""

from __future__ import annotations

from ..later import looked_up_later

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
__getattr__ = looked_up_later(globals(), _LATER)
