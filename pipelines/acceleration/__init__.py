"""Sparse attention in the diffusers pipelines that exist: `accelerate`, the step clock, and one row a model family.

The names are looked up on first use: modules of this folder that need no diffusers, such as the table of a scheduler,
are also of use where it is not installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..later import looked_up_later

if TYPE_CHECKING:
    from .families import FAMILIES as FAMILIES
    from .families import Family as Family
    from .families import find_transformers as find_transformers
    from .families import supported_pipelines as supported_pipelines
    from .handle import Handle as Handle
    from .handle import accelerate as accelerate
    from .handle import restore as restore

_LATER = {
    **dict.fromkeys(("FAMILIES", "Family", "find_transformers", "supported_pipelines"), ".families"),
    **dict.fromkeys(("Handle", "accelerate", "restore"), ".handle"),
}

__all__ = sorted(_LATER)
if not TYPE_CHECKING:  # see the root of the package
    __getattr__ = looked_up_later(globals(), _LATER)
