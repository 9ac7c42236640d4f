"""Guidance without a second forward pass (GFT, arXiv 2501.15420): a LoRA and an embedding of the guidance.

The names are looked up on first use, because diffusers, on which they are built, takes seconds to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..later import looked_up_later

if TYPE_CHECKING:
    from .adapter_file import GuidanceFreeAdapter as GuidanceFreeAdapter
    from .adapter_file import GuidanceFreeError as GuidanceFreeError
    from .adapter_file import read_adapter as read_adapter
    from .beta import BETA as BETA
    from .beta import BetaEmbedder as BetaEmbedder
    from .beta import BetaSlot as BetaSlot
    from .beta import no_slot as no_slot
    from .handle import GuidanceFree as GuidanceFree
    from .handle import guidance_free as guidance_free

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
if not TYPE_CHECKING:  # see the root of the package
    __getattr__ = looked_up_later(globals(), _LATER)
