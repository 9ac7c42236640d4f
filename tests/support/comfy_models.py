"""The real native models of ComfyUI at tiny sizes with random weights, sampled in this process.

Importing this module imports ComfyUI from `COMFYUI_PATH`, on the CPU.
"""

from __future__ import annotations

import inspect
import os
import sys
from typing import Any

import torch
from comfy_others import OTHERS
from comfy_tiny import Size, Tiny, randn
from comfy_wan import WAN

sys.path.insert(0, os.environ["COMFYUI_PATH"])

import comfy.options
from comfy.cli_args import args

args.cpu = True
args.use_pytorch_cross_attention = True  # as on every GPU; the CPU's default cannot do LTX-Video's text masks

import comfy.model_base  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.nested_tensor  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.supported_models as supported  # noqa: E402

MODELS: dict[str, Tiny] = WAN | OTHERS


def missing(tiny: Tiny) -> str:
    """Why this ComfyUI cannot build a model; empty where it can."""
    if tiny.needs in inspect.getsource(comfy.model_base):
        return ""
    return f"this ComfyUI has no {tiny.needs} yet"


def build(tiny: Tiny) -> comfy.model_patcher.ModelPatcher:
    """A MODEL with random weights."""
    config = getattr(supported, tiny.config)(dict(tiny.unet))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.diffusion_model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * (tiny.scale if weight.ndim > 1 else 0.05))
        for name, values in tiny.buffers.items():
            model.diffusion_model.get_buffer(name).copy_(values)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)


def conditioning(tiny: Tiny, seed: int, conditions: dict[str, Any]) -> list:
    """A positive or negative prompt."""
    values = {"pooled_output": randn(1, 24, seed=seed + 50), **conditions}
    if tiny.config in ("GenmoMochi", "LTXV", "LTXAV"):
        values["attention_mask"] = torch.ones(1, tiny.text, dtype=torch.long)
    return [[randn(1, tiny.text, tiny.text_dim, seed=seed), values]]


def empty_latent(tiny: Tiny, latent: Size, batch: int) -> Any:
    """Zeros `[B, C, T, H, W]`, with those of the audio where the model makes it too."""
    video = torch.zeros(batch, tiny.channels, *latent)
    if tiny.audio is None:
        return video
    return comfy.nested_tensor.NestedTensor([video, torch.zeros(batch, *tiny.audio[1:])])


def sample(
    model: Any,
    tiny: Tiny,
    *,
    latent: Size | None = None,
    steps: int = 4,
    batch: int = 1,
    add: torch.Tensor | None = None,
    conditions: dict[str, Any] | None = None,
    **options: Any,
) -> torch.Tensor:
    """KSampler's work: a sampled latent `[B, C, T, H, W]`, or `[B, 1, values]` of video and audio.

    Args:
        model: a MODEL. tiny: its description.
        latent: `(T, H, W)`, the description's unless given. steps, batch: of the sampling.
        add: `[C, T, H, W]`, added to the noise of the video.
        conditions: added to those of the description.
        options: of ComfyUI's `sample`; positive and negative are prompts in place of the description's.
    """
    latent = latent or tiny.latent
    empty = empty_latent(tiny, latent, batch)
    noise = comfy.sample.prepare_noise(empty, options.get("seed", 0))
    if add is not None:
        (noise.unbind()[0] if noise.is_nested else noise).add_(add)
    entries = {**tiny.conditions(latent), **(conditions or {})}  # of one object for both prompts, as nodes give them
    settings = {"denoise": 1.0, "seed": 0, "disable_pbar": True} | options
    prompts = {name: conditioning(tiny, seed, entries) for name, seed in (("positive", 1), ("negative", 2))}
    positive, negative = (settings.pop(name, made) for name, made in prompts.items())
    if tiny.mask is not None:
        settings["noise_mask"] = tiny.mask(latent)
    sampler = settings.pop("sampler", "euler")
    with torch.inference_mode():
        out = comfy.sample.sample(
            model, noise, steps, tiny.cfg, sampler, "simple", positive, negative, empty, **settings
        )
    return comfy.utils.pack_latents(out.unbind())[0] if out.is_nested else out
