"""diffusers pipelines in rooms: `acceleration`, `guidance_free`, `length` and `presets` of those that exist, and
`deep_compression` (DC-VideoGen, DC-Gen) and `few_steps` of those that do not. `files`, `loras` and `hooks` are what the
rooms share.

The names are looked up on first use, here and in the rooms, because diffusers takes seconds to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import acceleration as acceleration
from . import cfg_parallel as cfg_parallel
from . import deep_compression as deep_compression
from . import few_steps as few_steps
from . import guidance_cache as guidance_cache
from . import guidance_free as guidance_free
from . import length as length
from . import presets as presets
from . import tiny_decoder as tiny_decoder
from .later import looked_up_later

if TYPE_CHECKING:
    from .acceleration import FAMILIES as FAMILIES
    from .acceleration import Family as Family
    from .acceleration import Handle as Handle
    from .acceleration import accelerate as accelerate
    from .acceleration import find_transformers as find_transformers
    from .acceleration import supported_pipelines as supported_pipelines
    from .deep_compression import DCGenFluxPipeline as DCGenFluxPipeline
    from .deep_compression import DCGenPipeline as DCGenPipeline
    from .deep_compression import DCGenSanaPipeline as DCGenSanaPipeline
    from .deep_compression import DCVideoGenImageToVideoPipeline as DCVideoGenImageToVideoPipeline
    from .deep_compression import DCVideoGenPipeline as DCVideoGenPipeline
    from .deep_compression import convert_repository as convert_repository
    from .hooks.undo import restore as restore

_LATER = {
    **dict.fromkeys(
        ("FAMILIES", "Family", "Handle", "accelerate", "find_transformers", "supported_pipelines"), ".acceleration"
    ),
    "restore": ".hooks.undo",
    **dict.fromkeys(deep_compression.__all__, ".deep_compression"),
}

__all__ = sorted(_LATER)
if not TYPE_CHECKING:  # see the root of the package
    __getattr__ = looked_up_later(globals(), _LATER)
