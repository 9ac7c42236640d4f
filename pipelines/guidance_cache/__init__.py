"""Guidance whose second pass is made in some steps only, and extrapolated in the others.

The names are looked up on first use, because diffusers, on which they are built, takes seconds to import.
"""

from __future__ import annotations

from ..later import looked_up_later

_LATER = {"CachedGuidance": ".handle", "GuidanceCache": ".settings", "guidance_cache": ".handle"}

__all__ = sorted(_LATER)
__getattr__ = looked_up_later(globals(), _LATER)
