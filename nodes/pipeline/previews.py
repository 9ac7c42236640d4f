"""Pictures of a video of a diffusers pipeline while it is being made."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def has_known_latents(pipe: DiffusionPipeline) -> bool:
    """Whether the latents of its steps are Wan's or DC-AE-V's, `[B, C, F, h, w]`: others differ in order or colour."""
    of_wan = type(pipe.vae).__name__ == "AutoencoderKLWan" and type(pipe).__name__.startswith("Wan")
    return of_wan or type(pipe.vae).__name__ == "AutoencoderDCV"


def preview_latent(pipe: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
    """The middle frame of what the model makes of the latents at this step, `[1, C, 1, h, w]`.

    A scheduler that keeps the denoised video of its last step (UniPC, DPM++) gives that; others give the noisy one.
    """
    outputs = getattr(pipe.scheduler, "model_outputs", None) or [None]
    denoised = outputs[-1] if getattr(pipe.scheduler.config, "predict_x0", False) else None
    video = latents if denoised is None or denoised.shape != latents.shape else denoised
    middle = video.shape[2] // 2
    return video[:1, :, middle : middle + 1]


def decode_frame(pipe: DiffusionPipeline, latent: torch.Tensor) -> torch.Tensor:
    """A latent frame `[1, C, 1, h, w]` as a picture `[H, W, 3]` in [0, 1], through the autoencoder."""
    config = pipe.vae.config
    mean, std = (
        torch.tensor(values, device=latent.device, dtype=latent.dtype).view(1, -1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    with torch.no_grad():
        frame = pipe.vae.decode((latent * std + mean).to(pipe.vae.dtype), return_dict=False)[0]
    return (frame[0, :, 0].movedim(0, -1).float() / 2 + 0.5).clamp(0, 1)


def decodes_quickly(pipe: DiffusionPipeline) -> bool:
    """Whether the autoencoder is small enough to decode a frame at every step (the demo's)."""
    return sum(parameter.numel() for parameter in pipe.vae.parameters()) < 5_000_000
