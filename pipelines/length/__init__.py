"""Videos longer than a model was trained on: its rotary embedding (RIFLEx), and LoRAs that were trained for it.

The names are looked up on first use, because diffusers, on which they are built, takes seconds to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..later import looked_up_later

if TYPE_CHECKING:
    from .adapter_file import LengthAdapter as LengthAdapter
    from .adapter_file import read_length as read_length
    from .handle import Lengthened as Lengthened
    from .handle import lengthen as lengthen
    from .rotary import RiflexHandle as RiflexHandle
    from .rotary import riflex as riflex
    from .settings import Riflex as Riflex
    from .trained import LengthError as LengthError
    from .trained import TrainedLength as TrainedLength
    from .trained import facts_of_length as facts_of_length
    from .trained import trained_length as trained_length

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
if not TYPE_CHECKING:  # see the root of the package
    __getattr__ = looked_up_later(globals(), _LATER)
