"""DC-VideoGen and DC-Gen: pipelines in the latent space of a deep-compression autoencoder, and what they load.

The classes are looked up on first use, because diffusers' own, on which they are built, take seconds to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..later import looked_up_later

if TYPE_CHECKING:
    from .image_to_video import DCVideoGenImageToVideoPipeline as DCVideoGenImageToVideoPipeline
    from .published import convert_repository as convert_repository
    from .text_to_image import DCGenFluxPipeline as DCGenFluxPipeline
    from .text_to_image import DCGenPipeline as DCGenPipeline
    from .text_to_image import DCGenSanaPipeline as DCGenSanaPipeline
    from .text_to_video import DCVideoGenPipeline as DCVideoGenPipeline

_LATER = {
    "DCGenFluxPipeline": ".text_to_image",
    "DCGenPipeline": ".text_to_image",
    "DCGenSanaPipeline": ".text_to_image",
    "DCVideoGenImageToVideoPipeline": ".image_to_video",
    "DCVideoGenPipeline": ".text_to_video",
    "convert_repository": ".published",
}

__all__ = sorted(_LATER)
if not TYPE_CHECKING:  # see the root of the package
    __getattr__ = looked_up_later(globals(), _LATER)
