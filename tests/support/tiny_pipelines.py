"""Real pipelines of several video families at tiny sizes, with random weights: how their loops call a transformer.

Text is embeddings and results are latents, so that no text encoder and, but for its config, no autoencoder is needed.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from tiny_wan import make_pipe, make_transformer

from vidaccel.attention import StepInfo
from vidaccel.pipelines.acceleration.clock import StepClock


def watch(pipe: Any, *transformers: str) -> tuple[StepClock, list[StepInfo]]:
    """Let a clock read every forward pass of a pipeline's transformers; what it said comes into the list."""
    clock = StepClock(lambda: pipe.scheduler, lambda: getattr(pipe, "num_timesteps", None))
    seen: list[StepInfo] = []
    for name in transformers or ("transformer",):
        transformer = getattr(pipe, name)
        signature = inspect.signature(type(transformer).forward)

        def read(module, args, kwargs, name=name, signature=signature):
            given = signature.bind_partial(module, *args, **kwargs).arguments
            seen.append(clock.observe(torch.as_tensor(given["timestep"]), name, ("cond", "uncond")))

        transformer.register_forward_pre_hook(read, with_kwargs=True)
    return clock, seen


class Vae(torch.nn.Module):
    """The facts of an autoencoder that pipelines read."""

    dtype, device = torch.float32, torch.device("cpu")
    spatial_compression_ratio, temporal_compression_ratio = 8, 4

    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(
            scaling_factor=1.0, latents_mean=[0.0] * 4, latents_std=[1.0] * 4, z_dim=4, latent_channels=4,
            shift_factor=None, scale_factor_temporal=4, scale_factor_spatial=8,
        )  # fmt: skip

    def decode(self, latents, return_dict=True):
        return (torch.zeros(1, 3, 9, 64, 64),)


def _text(tokens: int = 7, width: int = 16) -> dict[str, torch.Tensor]:
    return {"prompt_embeds": torch.randn(1, tokens, width), "negative_prompt_embeds": torch.randn(1, tokens, width)}


def wan(scheduler: Any, **more: Any) -> tuple[Any, dict[str, Any]]:
    pipe = make_pipe(scheduler=scheduler)
    return pipe, {"height": 64, "width": 64, "num_frames": 9, **_text(), **more}


def kandinsky5(shift: float) -> tuple[Any, dict[str, Any]]:
    """It casts timesteps to the dtype of the model."""
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16, out_visual_dim=4, model_dim=32, ff_dim=32,
        num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 6, 6),
    ).to(torch.bfloat16)  # fmt: skip
    pipe = diffusers.Kandinsky5T2VPipeline(
        transformer=transformer, vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
    )  # fmt: skip
    text = {}
    for branch in ("prompt", "negative_prompt"):
        text[f"{branch}_embeds_qwen"] = torch.randn(1, 7, 16, dtype=torch.bfloat16)
        text[f"{branch}_embeds_clip"] = torch.randn(1, 8, dtype=torch.bfloat16)
        text[f"{branch}_cu_seqlens"] = torch.tensor([0, 7])
    return pipe, {"height": 128, "width": 128, "num_frames": 5, **text}


def mochi() -> tuple[Any, dict[str, Any]]:
    """Its timesteps rise; both branches are in one batch."""
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=16, num_layers=1, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=16, time_embed_dim=8, max_sequence_length=8,
    )  # fmt: skip
    pipe = diffusers.MochiPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), vae=None, text_encoder=None,
        tokenizer=None, transformer=transformer,
    )  # fmt: skip
    masks = {name: torch.ones(1, 8).bool() for name in ("prompt_attention_mask", "negative_prompt_attention_mask")}
    return pipe, {"height": 64, "width": 64, "num_frames": 7, **_text(8), **masks}


def skyreels_diffusion_forcing(**more: Any) -> tuple[Any, dict[str, Any]]:
    """It steps copies of its scheduler, one a latent frame."""
    transformer = make_transformer(cls=diffusers.SkyReelsV2Transformer3DModel, inject_sample_info=True)
    pipe = diffusers.SkyReelsV2DiffusionForcingPipeline(
        tokenizer=None, text_encoder=None, transformer=transformer, vae=None,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )  # fmt: skip
    size = {"height": 64, "width": 64, "num_frames": 17, "base_num_frames": 17}
    return pipe, {**size, "prompt": None, **_text(), "fps": 24, **more}


def cosmos(**more: Any) -> tuple[Any, dict[str, Any]]:
    """The model is given a noise level; no timestep of its scheduler's."""
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, mlp_ratio=2.0,
        text_embed_dim=16, adaln_lora_dim=4, max_size=(8, 16, 16), patch_size=(1, 2, 2), concat_padding_mask=False,
        extra_pos_embed_type=None,
    )  # fmt: skip
    pipe = diffusers.Cosmos2TextToImagePipeline.__new__(diffusers.Cosmos2TextToImagePipeline)
    diffusers.DiffusionPipeline.__init__(pipe)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    parts = {"text_encoder": None, "tokenizer": None, "vae": Vae(), "safety_checker": None}
    pipe.register_modules(transformer=transformer, scheduler=scheduler, **parts)
    pipe.__dict__["safety_checker"] = types.SimpleNamespace(to=lambda device: None, check_text_safety=lambda text: True)
    pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial = 4, 8
    scheduler.register_to_config(sigma_max=80.0, sigma_min=0.002, sigma_data=1.0, final_sigmas_type="sigma_min")
    return pipe, {"height": 64, "width": 64, **_text(), **more}


def helios() -> tuple[Any, dict[str, Any]]:
    """It makes a video chunk by chunk, each from a table of its own."""
    changes = {"rope_dim": (12, 10, 10), "guidance_cross_attn": True, "is_amplify_history": True}
    transformer = _without(make_transformer, "rope_max_seq_len")(cls=diffusers.HeliosTransformer3DModel, **changes)
    pipe = diffusers.HeliosPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=transformer,
    )  # fmt: skip
    pipe.vae = Vae()
    chunks = {"num_latent_frames_per_chunk": 3, "history_sizes": [4, 2, 2]}
    return pipe, {"height": 64, "width": 64, "num_frames": 18, **chunks, **_text()}


def _without(make: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """`make_transformer` for a class that lacks some of Wan's settings."""
    from tiny_wan import TRANSFORMER

    def build(cls: type, **changes: Any) -> torch.nn.Module:
        settings = {name: value for name, value in TRANSFORMER.items() if name not in names}
        torch.manual_seed(0)
        return cls(**{**settings, **changes}).eval()

    return build
