"""A tiny decoder in the place of an autoencoder's own.

The names are looked up on first use, because diffusers, on which they are built, takes seconds to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..later import looked_up_later

if TYPE_CHECKING:
    from .handle import TinyDecoder as TinyDecoder
    from .handle import tiny_decoder as tiny_decoder
    from .source import TinyDecoderError as TinyDecoderError
    from .source import find_decoder as find_decoder

_LATER = {
    "TinyDecoder": ".handle",
    "TinyDecoderError": ".source",
    "find_decoder": ".source",
    "tiny_decoder": ".handle",
}

__all__ = sorted(_LATER)
if not TYPE_CHECKING:  # see the root of the package
    __getattr__ = looked_up_later(globals(), _LATER)
