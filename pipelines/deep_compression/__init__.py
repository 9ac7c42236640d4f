"""DC-VideoGen and DC-Gen: pipelines in the latent space of a deep-compression autoencoder, and what they load.

The classes are looked up on first use, because diffusers' own, on which they are built, take seconds to import.
"""

from __future__ import annotations

from ..later import looked_up_later

_LATER = {
    "DCGenFluxPipeline": ".text_to_image",
    "DCGenPipeline": ".text_to_image",
    "DCGenSanaPipeline": ".text_to_image",
    "DCVideoGenImageToVideoPipeline": ".image_to_video",
    "DCVideoGenPipeline": ".text_to_video",
    "convert_repository": ".published",
}

__all__ = sorted(_LATER)
__getattr__ = looked_up_later(globals(), _LATER)
