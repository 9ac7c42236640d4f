"""Real Wan pipelines at tiny sizes, without text encoder and VAE: prompts are embeddings, results are latents."""

from __future__ import annotations

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 3,
    "rope_max_seq_len": 64,
}


def make_transformer(seed: int = 0, cls: type = WanTransformer3DModel, **changes) -> torch.nn.Module:
    torch.manual_seed(seed)
    return cls(**{**TRANSFORMER, **changes}).eval()


def make_scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def make_pipe(cls: type = WanPipeline, **components) -> WanPipeline:
    parts = {"transformer": make_transformer(), "scheduler": make_scheduler(), **components}
    pipe = cls(**{"tokenizer": None, "text_encoder": None, "vae": None, **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def aligned(module: torch.nn.Module) -> torch.nn.Module:
    """The module with its weights in memory of torch's. Weights that were loaded begin where they do in their file, and
    some processors then round products otherwise."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    return module


def generate(
    pipe, steps: int = 4, frames: int = 17, size: int = 64, guidance_scale: float = 5.0, seed: int = 0, **more
):
    """Latents `[1, 4, (frames - 1) // 4 + 1, size // 8, size // 8]`."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(2, 1, 6, 16, generator=torch.Generator().manual_seed(99))
    return pipe(
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        **({} if "video" in more and "strength" in more else {"num_frames": frames}),
        height=size,
        width=size,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=generator,
        output_type="latent",
        **more,
    ).frames
