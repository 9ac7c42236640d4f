"""Tiny Wan pipelines that guidance-free adapters are tried on, and calls of them."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import WanPipeline
from tiny_wan import aligned, make_pipe

NO_TEXT = {"tokenizer": None, "text_encoder": None}


def saved(folder: Path, **components) -> Path:
    make_pipe(**components).save_pretrained(folder)
    return folder


def loaded(folder: Path) -> WanPipeline:
    pipe = WanPipeline.from_pretrained(folder, **NO_TEXT, vae=None)
    pipe.set_progress_bar_config(disable=True)
    aligned(pipe.transformer)
    return pipe


def made(pipe, scale: float = 5.0, steps: int = 3, **more) -> torch.Tensor:
    """Latents; with two passes a step a negative prompt must be there."""
    embeds = torch.randn(2, 1, 6, 16, generator=torch.Generator().manual_seed(99))
    if type(pipe).do_classifier_free_guidance is not False:
        more = {"negative_prompt_embeds": embeds[1], **more}
    return pipe(
        prompt_embeds=embeds[0],
        num_frames=9,
        height=64,
        width=64,
        num_inference_steps=steps,
        guidance_scale=scale,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **more,
    ).frames
