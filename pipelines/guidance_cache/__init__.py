"""Guidance whose second pass is made in some steps only, and extrapolated in the others.

The names are looked up on first use, because diffusers, on which they are built, takes seconds to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..later import looked_up_later

if TYPE_CHECKING:
    from .handle import CachedGuidance as CachedGuidance
    from .handle import guidance_cache as guidance_cache
    from .settings import GuidanceCache as GuidanceCache

_LATER = {"CachedGuidance": ".handle", "GuidanceCache": ".settings", "guidance_cache": ".handle"}

__all__ = sorted(_LATER)
if not TYPE_CHECKING:  # see the root of the package
    __getattr__ = looked_up_later(globals(), _LATER)
