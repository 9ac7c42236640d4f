"""diffusers pipelines in rooms: `acceleration`, `guidance_free`, `length` and `presets` of those that exist, and
`deep_compression` (DC-VideoGen, DC-Gen) and `few_steps` of those that do not.

The names are looked up on first use, because diffusers takes seconds to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import deep_compression
from .later import looked_up_later

if TYPE_CHECKING:
    from .acceleration import FAMILIES as FAMILIES
    from .acceleration import Family as Family
    from .acceleration import Handle as Handle
    from .acceleration import accelerate as accelerate
    from .acceleration import find_transformers as find_transformers
    from .acceleration import supported_pipelines as supported_pipelines
    from .undo import restore as restore

_LATER = {
    **dict.fromkeys(
        ("FAMILIES", "Family", "Handle", "accelerate", "find_transformers", "supported_pipelines"), ".acceleration"
    ),
    "restore": ".undo",
    **dict.fromkeys(deep_compression.__all__, ".deep_compression"),
}

__all__ = sorted(_LATER)
__getattr__ = looked_up_later(globals(), _LATER)
