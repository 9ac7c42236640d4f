"""CFG parallelism: two processes compute a branch of guidance each, and exchange what the models predict.

The names are looked up on first use, because diffusers, on which they are built, takes seconds to import.
"""

from __future__ import annotations

from ..later import looked_up_later

_LATER = {"CfgParallel": ".handle", "cfg_parallel": ".handle"}

__all__ = sorted(_LATER)
__getattr__ = looked_up_later(globals(), _LATER)
