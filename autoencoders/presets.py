"""Configurations of the published DC-AE-V autoencoders (DC-VideoGen, arXiv 2509.25182)."""

from __future__ import annotations

from typing import Any

_F32 = {
    "block_out_channels": (128, 256, 512, 512, 1024, 1024, 1024),
    "layers_per_block": (0, 5, 10, 4, 4, 4, 4),
}
_F64 = {
    "block_out_channels": (*_F32["block_out_channels"], 1024),
    "layers_per_block": (*_F32["layers_per_block"], 4),
}

# The scaling factor of f64t4c128 is the published one; that it equals f32t4c256's may be a slip of the publication.
PRESETS: dict[str, dict[str, Any]] = {
    "f32t4c32": {"latent_channels": 32, **_F32, "scaling_factor": 0.7241},
    "f32t4c64": {"latent_channels": 64, **_F32, "scaling_factor": 0.7614},
    "f32t4c128": {"latent_channels": 128, **_F32, "scaling_factor": 0.4457},
    "f32t4c256": {"latent_channels": 256, **_F32, "scaling_factor": 0.4752},
    "f64t4c128": {"latent_channels": 128, **_F64, "scaling_factor": 0.4752},
}


def preset(name: str) -> dict[str, Any]:
    """Arguments of `AutoencoderDCV` for a published variant; `vidaccel.autoencoders.PRESETS` lists them.

    Raises:
        ValueError: no such variant.
    """
    if name not in PRESETS:
        raise ValueError(f"There is no DC-AE-V variant {name!r}; the published ones are {', '.join(PRESETS)}.")
    return dict(PRESETS[name])
