"""Models that were distilled to few steps: the samplers of theirs, and checkpoints of TurboDiffusion and FastVideo.

The names are looked up on first use, because diffusers, on which they are built, takes seconds to import.
"""

from __future__ import annotations

from ..later import looked_up_later

_LATER = {
    "DMDScheduler": ".dmd",
    "GridScheduler": ".grid",
    "RCMScheduler": ".rcm",
    "convert_fastwan": ".fastwan",
    "convert_turbowan": ".turbowan",
    "scaled_start": ".start",
}

__all__ = sorted(_LATER)
__getattr__ = looked_up_later(globals(), _LATER)
