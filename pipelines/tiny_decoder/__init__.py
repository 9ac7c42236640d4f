"""A tiny decoder in the place of an autoencoder's own.

The names are looked up on first use, because diffusers, on which they are built, takes seconds to import.
"""

from __future__ import annotations

from ..later import looked_up_later

_LATER = {
    "TinyDecoder": ".handle",
    "TinyDecoderError": ".source",
    "find_decoder": ".source",
    "tiny_decoder": ".handle",
}

__all__ = sorted(_LATER)
__getattr__ = looked_up_later(globals(), _LATER)
