"""Videos longer than a model was trained on: its rotary embedding (RIFLEx), and LoRAs that were trained for it.

The names are looked up on first use, because diffusers, on which they are built, takes seconds to import.
"""

from __future__ import annotations

from ..later import looked_up_later

_LATER = {
    "LengthAdapter": ".adapter_file",
    "LengthError": ".trained",
    "Lengthened": ".handle",
    "Riflex": ".settings",
    "RiflexHandle": ".rotary",
    "TrainedLength": ".trained",
    "facts_of_length": ".trained",
    "lengthen": ".handle",
    "read_length": ".adapter_file",
    "riflex": ".rotary",
    "trained_length": ".trained",
}

__all__ = sorted(_LATER)
__getattr__ = looked_up_later(globals(), _LATER)
