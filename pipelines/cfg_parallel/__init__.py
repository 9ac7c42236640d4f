"""CFG parallelism: two processes compute a branch of guidance each, and exchange what the models predict.

The names are looked up on first use, because diffusers, on which they are built, takes seconds to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..later import looked_up_later

if TYPE_CHECKING:
    from .handle import CfgParallel as CfgParallel
    from .handle import cfg_parallel as cfg_parallel

_LATER = {"CfgParallel": ".handle", "cfg_parallel": ".handle"}

__all__ = sorted(_LATER)
if not TYPE_CHECKING:  # see the root of the package
    __getattr__ = looked_up_later(globals(), _LATER)
