"""Real pipelines of several video families at tiny sizes with random weights, and what a step clock makes of them.

Each builder returns `(pipe, options of its call)`. There is no text encoder (prompts are embeddings) and, where the
pipeline allows it, no autoencoder (results are latents).
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from no_torchvision import without_torchvision
from tiny_families.hunyuan import HUNYUAN
from tiny_wan import make_scheduler, make_transformer

from vidaccel.attention import StepInfo
from vidaccel.pipelines.acceleration.clock import StepClock

SIZES = {"height": 64, "width": 96, "num_frames": 9}
_WAN = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}


class Autoencoder(torch.nn.Module):
    """What pipelines read of an autoencoder whose results do not matter here."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            z_dim=4,
            latent_channels=4,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
            scaling_factor=1.0,
            sigma_data=1.0,
            scale_factor_temporal=4,
            scale_factor_spatial=8,
        )

    def encode(self, video: torch.Tensor) -> SimpleNamespace:
        shape = (video.shape[0], 4, (video.shape[2] - 1) // 4 + 1, video.shape[3] // 8, video.shape[4] // 8)
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda generator=None: torch.zeros(shape)))

    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        return (torch.zeros(1, 3, 9, 64, 96),)


class SafetyChecker(torch.nn.Module):
    """Cosmos insists on one; its own is 10 GB of weights, and there is no prompt to check."""

    dtype, device = torch.float32, torch.device("cpu")


def embeds(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan(scheduler: Any = None, **components: Any) -> tuple[Any, dict[str, Any]]:
    parts = {"transformer": make_transformer(num_layers=1), "scheduler": scheduler or make_scheduler(), **components}
    pipe = diffusers.WanPipeline(tokenizer=None, text_encoder=None, vae=None, **parts)
    return quiet(pipe), SIZES | {"prompt_embeds": embeds(1, 7, 16), "negative_prompt_embeds": embeds(1, 7, 16)}


def cogvideox(scheduler: Any = None) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=1,
        sample_width=12,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=6,
    )
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=transformer,
        scheduler=scheduler or diffusers.CogVideoXDDIMScheduler(),
    )
    texts = {"prompt_embeds": embeds(1, 6, 16), "negative_prompt_embeds": embeds(1, 6, 16)}
    return quiet(pipe), SIZES | texts | {"guidance_scale": 6.0}


def mochi() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        max_sequence_length=8,
    )
    torch.nn.init.normal_(transformer.pos_frequencies)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    pipe = diffusers.MochiPipeline(
        scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None, transformer=transformer
    )
    masks = dict.fromkeys(("prompt_attention_mask", "negative_prompt_attention_mask"), torch.ones(1, 8).bool())
    texts = dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), embeds(1, 8, 16))
    return quiet(pipe), SIZES | {"num_frames": 13} | masks | texts


def kandinsky5(shift: float = 10.0, layers: int = 1) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        out_visual_dim=4,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=layers,
        axes_dims=(4, 6, 6),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae")
    pipe = diffusers.Kandinsky5T2VPipeline(transformer=transformer, scheduler=scheduler, **dict.fromkeys(names))
    options = {"height": 128, "width": 128, "num_frames": 5}
    for prefix in ("", "negative_"):
        options[f"{prefix}prompt_embeds_qwen"] = embeds(1, 7, 16)
        options[f"{prefix}prompt_embeds_clip"] = embeds(1, 8)
        options[f"{prefix}prompt_cu_seqlens"] = torch.tensor([0, 7])
    return quiet(pipe), options


def skyreels_diffusion_forcing(**options: Any) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.SkyReelsV2Transformer3DModel(
        **_WAN,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        rope_max_seq_len=64,
        inject_sample_info=True,
    )
    pipe = diffusers.SkyReelsV2DiffusionForcingPipeline(
        tokenizer=None, text_encoder=None, transformer=transformer, vae=None, scheduler=make_scheduler()
    )
    texts = {"prompt": None, "prompt_embeds": embeds(1, 7, 16), "negative_prompt_embeds": embeds(1, 7, 16), "fps": 24}
    return quiet(pipe), SIZES | {"num_frames": 17, "base_num_frames": 17} | texts | options


def helios() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.HeliosTransformer3DModel(
        **_WAN,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        rope_dim=(4, 6, 6),
        guidance_cross_attn=True,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.HeliosPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer
    )
    pipe.vae = Autoencoder()
    texts = {"prompt_embeds": embeds(1, 7, 16), "negative_prompt_embeds": embeds(1, 7, 16)}
    chunks = {"num_frames": 18, "num_latent_frames_per_chunk": 3, "history_sizes": [4, 2, 2]}
    return quiet(pipe), SIZES | chunks | texts


def hunyuan() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.HunyuanVideoTransformer3DModel(**HUNYUAN, num_layers=2, num_single_layers=2)
    pipe = diffusers.HunyuanVideoPipeline(
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae")),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    texts = {
        "prompt_embeds": embeds(1, 8, 16),
        "pooled_prompt_embeds": embeds(1, 8),
        "prompt_attention_mask": torch.ones(1, 8),
    }
    return quiet(pipe), SIZES | texts


def framepack() -> tuple[Any, dict[str, Any]]:
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    transformer = diffusers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
        guidance_embeds=True,
        has_image_proj=True,
        image_proj_dim=16,
        has_clean_x_embedder=True,
    )
    eyes = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    pipe = diffusers.HunyuanVideoFramepackPipeline(
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae")),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        image_encoder=SiglipVisionModel(eyes),
        feature_extractor=SiglipImageProcessor(size={"height": 32, "width": 32}),
    )
    pipe.vae = Autoencoder()
    sections = {"num_frames": 18, "latent_window_size": 3}
    texts = {
        "prompt_embeds": embeds(1, 8, 16),
        "pooled_prompt_embeds": embeds(1, 8),
        "prompt_attention_mask": torch.ones(1, 8),
    }
    picture = {"image": torch.zeros(1, 3, 64, 96)}
    return quiet(pipe), SIZES | sections | texts | picture


def cosmos2(monkeypatch: Any) -> tuple[Any, dict[str, Any]]:
    """Cosmos Predict2, text to image: its transformer gets `sigma / (sigma + 1)`, not the scheduler's timestep."""
    without_torchvision(monkeypatch)
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(8, 32, 32),
        extra_pos_embed_type=None,
        concat_padding_mask=True,
    )
    pipe = diffusers.Cosmos2TextToImagePipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        vae=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        safety_checker=SafetyChecker(),
    )
    texts = {"prompt_embeds": embeds(1, 7, 16), "negative_prompt_embeds": embeds(1, 7, 16)}
    return quiet(pipe), {"height": 64, "width": 96} | texts


def watched(pipe: Any, branches: tuple[str, ...] = ("cond", "uncond"), argument: str = "timestep"):
    """Feed a clock with every forward pass of a pipeline's transformers.

    Returns:
        The clock, and the list that each pass's `StepInfo` and component are appended to.
    """
    clock, seen = StepClock(pipe), []
    for name in ("transformer", "transformer_2"):
        if getattr(pipe, name, None) is not None:
            listen(clock, seen, getattr(pipe, name), name, branches, argument)
    return clock, seen


def listen(
    clock: StepClock,
    seen: list[StepInfo],
    model: torch.nn.Module,
    name: str = "transformer",
    branches: tuple[str, ...] = ("cond", "uncond"),
    argument: str = "timestep",
) -> None:
    signature = inspect.signature(type(model).forward)

    def hook(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = signature.bind_partial(module, *args, **kwargs).arguments
        seen.append(clock.observe(torch.as_tensor(given[argument]), name, branches))

    model.register_forward_pre_hook(hook, with_kwargs=True)


def run(pipe: Any, options: dict[str, Any], steps: int = 4, **more: Any) -> None:
    """One run for its forward passes; the result is latents."""
    pipe(**{**options, "num_inference_steps": steps, "output_type": "latent", **more})
