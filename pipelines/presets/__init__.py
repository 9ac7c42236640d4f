"""Presets: all that makes a pipeline faster under one description, and one account of it.

The names are looked up on first use, because diffusers, on which they are built, takes seconds to import.
"""

from __future__ import annotations

from ..later import looked_up_later

_LATER = {
    "CACHES": ".preset",
    "Account": ".account",
    "Applied": ".applied",
    "Cache": ".preset",
    "LoraFile": ".preset",
    "Preset": ".preset",
    "PresetError": ".errors",
    "Quantize": ".preset",
    "SchedulerChoice": ".preset",
    "apply": ".applied",
    "load_preset": ".files",
    "measure_mag_ratios": ".ratios",
    "save_preset": ".files",
    "shipped_presets": ".files",
}

__all__ = sorted(_LATER)
__getattr__ = looked_up_later(globals(), _LATER)
