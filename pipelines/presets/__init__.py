"""Presets: all that makes a pipeline faster under one description, and one account of it.

The names are looked up on first use, because diffusers, on which they are built, takes seconds to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..later import looked_up_later

if TYPE_CHECKING:
    from .account import Account as Account
    from .applied import Applied as Applied
    from .applied import apply as apply
    from .errors import PresetError as PresetError
    from .files import load_preset as load_preset
    from .files import save_preset as save_preset
    from .files import shipped_presets as shipped_presets
    from .levers import CACHES as CACHES
    from .levers import Cache as Cache
    from .levers import Compile as Compile
    from .levers import Quantize as Quantize
    from .levers import SchedulerChoice as SchedulerChoice
    from .preset import LoraFile as LoraFile
    from .preset import Preset as Preset
    from .ratios import measure_mag_ratios as measure_mag_ratios

_LATER = {
    "CACHES": ".levers",
    "Account": ".account",
    "Applied": ".applied",
    "Cache": ".levers",
    "Compile": ".levers",
    "LoraFile": ".preset",
    "Preset": ".preset",
    "PresetError": ".errors",
    "Quantize": ".levers",
    "SchedulerChoice": ".levers",
    "apply": ".applied",
    "load_preset": ".files",
    "measure_mag_ratios": ".ratios",
    "save_preset": ".files",
    "shipped_presets": ".files",
}

__all__ = sorted(_LATER)
if not TYPE_CHECKING:  # see the root of the package
    __getattr__ = looked_up_later(globals(), _LATER)
