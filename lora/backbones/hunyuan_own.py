"""HunyuanVideo as it is: text to video, and what image to video has in common with it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from torch import nn

from ...attention.layout import VideoLayout
from ..config import ConfigError
from ..flow import TIMESTEPS
from .base import SampleRequest, Text
from .folders import read_config
from .pipeline_family import padded, without_padding
from .video_own import OwnVideoModel

PUBLISHED_WIDTH = 3072
"""The width of all published models, at which diffusers takes the single blocks of files with HunyuanVideo's own names
apart."""

_FILE_PARTS = {
    "attn.to_out.0": "img_attn_proj",
    "attn.to_add_out": "txt_attn_proj",
    "ff.net.0.proj": "img_mlp.fc1",
    "ff.net.2": "img_mlp.fc2",
    "ff_context.net.0.proj": "txt_mlp.fc1",
    "ff_context.net.2": "txt_mlp.fc2",
    "norm1.linear": "img_mod.linear",
    "norm1_context.linear": "txt_mod.linear",
}
_SINGLE_PARTS = {"proj_out": "linear2", "norm.linear": "modulation.linear"}
_MERGED = {
    "attn.to_q": ("img_attn_qkv", 0),
    "attn.to_k": ("img_attn_qkv", 1),
    "attn.to_v": ("img_attn_qkv", 2),
    "attn.add_q_proj": ("txt_attn_qkv", 0),
    "attn.add_k_proj": ("txt_attn_qkv", 1),
    "attn.add_v_proj": ("txt_attn_qkv", 2),
}
_SINGLE_MERGED = {"attn.to_q": 0, "attn.to_k": 1, "attn.to_v": 2, "proj_mlp": 3}
_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")


class HunyuanVideoModel(OwnVideoModel):
    """HunyuanVideo, which is distilled on guidance: in training it is told a scale of 1, unless another is set."""

    text_pipeline = HunyuanVideoPipeline
    transformer_class, vae_class = HunyuanVideoTransformer3DModel, AutoencoderKLHunyuanVideo
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    text_length = 256
    usual_guidance = 1.0
    frame_step = 4
    self_attention = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )
    lora_targets = (
        *self_attention,
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
        "proj_mlp",
        "proj_out",
    )
    lora_within = ("transformer_blocks.", "single_transformer_blocks.")  # not those that refine the text

    @property
    def takes_negative_prompts(self) -> bool:
        return self.guidance is None

    def check_base(self) -> None:
        self.check_channels(self.vae.get("latent_channels", 16), self.config["in_channels"])
        self.scheduler = read_config(FlowMatchEulerDiscreteScheduler, self.base, "scheduler")
        self.width = self.config["num_attention_heads"] * self.config["attention_head_dim"]

    def check_channels(self, channels: int, given: int) -> None:
        """Raise ConfigError for a transformer that takes something else than the latents.

        Args:
            channels: of the autoencoder.
            given: to the transformer.
        """
        if given != channels or self.config.get("image_condition_type") is not None:
            raise ConfigError(
                f"model.base: the transformer of {self.base} takes {given} channels and the picture as "
                f"{self.config.get('image_condition_type')}; a text-to-video model takes the {channels} of its "
                "autoencoder and no picture."
            )

    @property
    def token(self) -> int:
        return self.vae.get("spatial_compression_ratio", 8) * self.config["patch_size"]

    def grid(self, frames: int, height: int, width: int) -> VideoLayout:
        size = ((frames - 1) // 4 + 1, height // self.token, width // self.token)
        return VideoLayout(*size, text_after=self.text_length + self.picture_tokens)

    @property
    def picture_tokens(self) -> int:
        """Tokens of the text that stand for a picture."""
        return 0

    def shown(self, latents: torch.Tensor, conditions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Noisy latents with what the transformer gets beside them, `[B, C, T, H, W]`."""
        return latents

    # -- names in files ------------------------------------------------------------------------------------------------

    def check_layers(self, layers: Sequence[str]) -> str | None:
        if self.width != PUBLISHED_WIDTH:
            return None
        other = [layer for layer in layers if native_name(layer) is None]
        if other:
            return f"{other[0]} has no name that both diffusers and ComfyUI know in a file: leave it out."
        if not any("img_attn_qkv" in str(native_name(layer)) for layer in layers):
            return "diffusers knows files of HunyuanVideo by attn.to_q, to_k or to_v of the dual blocks: add one."
        return None

    def file_name(self, layer: str) -> str:
        own = native_name(layer) if self.width == PUBLISHED_WIDTH else None
        return f"transformer.{layer}" if own is None else f"diffusion_model.{own}"

    def file_rows(self, layer: str) -> tuple[slice, int] | None:
        if self.width != PUBLISHED_WIDTH:
            return None
        return native_rows(layer, self.width, int(self.width * self.config.get("mlp_ratio", 4.0)))

    # -- clips and prompts ---------------------------------------------------------------------------------------------

    def latents(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        return vae.encode(pixels).latent_dist.mode().float() * vae.config.scaling_factor

    def encode_prompts(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> list[Text]:
        states, pooled, mask = pipe.encode_prompt(
            list(prompts), device=self.device, max_sequence_length=self.text_length
        )
        pairs = zip(without_padding(states, mask, self.base), pooled.float().cpu(), strict=True)
        return [{"states": state, "pooled": pool.clone()} for state, pool in pairs]

    def count_tokens(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> list[int]:
        # Of the language model, without its template. CLIP gives one state for all of the prompt.
        return [len(ids) for ids in pipe.tokenizer(list(prompts), verbose=False, add_special_tokens=False).input_ids]

    # -- flow matching -------------------------------------------------------------------------------------------------

    def shift(self, latents: torch.Tensor) -> float:
        return float(self.scheduler.get("shift", 1.0))

    def velocity(
        self,
        model: nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        texts: Sequence[Text],
        conditions: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        states, mask = padded([text["states"] for text in texts])
        pooled = torch.stack([text["pooled"] for text in texts])
        guidance = None
        if self.guidance is not None:
            guidance = torch.full((len(latents),), self.guidance * TIMESTEPS, device=latents.device, dtype=self.dtype)
        return model(
            hidden_states=self.shown(latents, conditions),
            timestep=sigma * TIMESTEPS,
            encoder_hidden_states=states.to(latents.device, self.dtype),
            encoder_attention_mask=mask.to(latents.device, self.dtype),
            pooled_projections=pooled.to(latents.device, self.dtype),
            guidance=guidance,
            return_dict=False,
        )[0]

    def prompt_inputs(self, text: Text, negative: Text, request: SampleRequest) -> dict[str, Any]:
        """A distilled model is told the guidance scale; one that is not runs with the negative prompt as well."""
        states, mask = padded([text["states"], negative["states"]])
        names = ("prompt_embeds", "prompt_attention_mask", "pooled_prompt_embeds")
        made: dict[str, Any] = {"guidance_scale": request.guidance_scale}
        if self.guidance is None:
            made = {"guidance_scale": 1.0, "true_cfg_scale": request.guidance_scale}
        for number, (name, each) in enumerate((("", text), ("negative_", negative))):
            values = self.in_pipeline(states[number], mask[number], each["pooled"])
            for key, value in zip(names, values, strict=True):
                made[f"{name}{key}"] = value
        return made


def native_name(layer: str) -> str | None:
    """HunyuanVideo's own name of a layer of a block, which ComfyUI knows and diffusers translates; None for others."""
    found = _BLOCK.fullmatch(layer)
    if found is None:
        return None
    single, number, part = found.groups()
    if single:
        own = "linear1" if part in _SINGLE_MERGED else _SINGLE_PARTS.get(part)
        return None if own is None else f"single_blocks.{number}.{own}"
    own = _MERGED[part][0] if part in _MERGED else _FILE_PARTS.get(part)
    return None if own is None else f"double_blocks.{number}.{own}"


def native_rows(layer: str, width: int, inner: int) -> tuple[slice, int] | None:
    """Where a layer is in one with several, see `OwnModel.file_rows`.

    Args:
        layer: of a block.
        width: of the tokens.
        inner: of the feed-forward.
    """
    single, _, part = _BLOCK.fullmatch(layer).groups()
    place = _SINGLE_MERGED.get(part) if single else _MERGED.get(part, (None, None))[1]
    if place is None:
        return None
    first = place * width
    rows = inner if part == "proj_mlp" else width
    return slice(first, first + rows), 3 * width + (inner if single else 0)
