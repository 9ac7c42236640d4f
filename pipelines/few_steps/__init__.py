"""Models that were distilled to few steps: the samplers of theirs, and checkpoints of TurboDiffusion and FastVideo.

The names are looked up on first use, because diffusers, on which they are built, takes seconds to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..later import looked_up_later

if TYPE_CHECKING:
    from .dmd import DMDScheduler as DMDScheduler
    from .fastwan import convert_fastwan as convert_fastwan
    from .grid import GridScheduler as GridScheduler
    from .rcm import RCMScheduler as RCMScheduler
    from .start import scaled_start as scaled_start
    from .turbowan import convert_turbowan as convert_turbowan

_LATER = {
    "DMDScheduler": ".dmd",
    "GridScheduler": ".grid",
    "RCMScheduler": ".rcm",
    "convert_fastwan": ".fastwan",
    "convert_turbowan": ".turbowan",
    "scaled_start": ".start",
}

__all__ = sorted(_LATER)
if not TYPE_CHECKING:  # see the root of the package
    __getattr__ = looked_up_later(globals(), _LATER)
