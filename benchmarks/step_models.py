"""The transformers that `step.py` measures, at full size with random weights, and what their forward pass is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Noise = Callable[..., Any]
"""`(*sizes) -> tensor` of the device and dtype that are measured."""


@dataclass(frozen=True)
class Model:
    """A transformer of diffusers.

    Args:
        transformer: its class.
        video: pixel frames, height and width that it is published with.
        factors: pixel frames per latent frame after the first, and pixels per latent pixel.
        inputs: `(config, noise, latent frames, height and width) -> arguments` of the forward pass, timestep left out.
        settings: what differs from the class's defaults.
        layers: the setting, or settings, that count its blocks.
    """

    transformer: str
    video: tuple[int, int, int]
    factors: tuple[int, int]
    inputs: Callable[[Any, Noise, int, int, int], dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    layers: tuple[str, ...] = ("num_layers",)

    def latent(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent frames, height and width of a video in pixels."""
        return (frames - 1) // self.factors[0] + 1, height // self.factors[1], width // self.factors[1]

    def with_layers(self, count: int) -> dict[str, Any]:
        """The settings with `count` blocks in all; 0 leaves them."""
        if not count:
            return self.settings
        shares = {name: count // len(self.layers) for name in self.layers}
        shares[self.layers[-1]] += count - sum(shares.values())
        return self.settings | shares


def _wan(config: Any, noise: Noise, f: int, h: int, w: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, config.in_channels, f, h, w),
        "encoder_hidden_states": noise(1, 512, config.text_dim),
    }


def _valid(valid: int, padded: int) -> Any:
    import torch

    return (torch.arange(padded) < valid).long()[None]


def _hunyuan(config: Any, noise: Noise, f: int, h: int, w: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, config.in_channels, f, h, w),
        "encoder_hidden_states": noise(1, 256, config.text_embed_dim),
        "encoder_attention_mask": _valid(100, 256),
        "pooled_projections": noise(1, config.pooled_projection_dim),
        "guidance": noise(1).abs() * 1000,
    }


def _hunyuan_15(config: Any, noise: Noise, f: int, h: int, w: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, config.in_channels, f, h, w),
        "encoder_hidden_states": noise(1, 1000, config.text_embed_dim),
        "encoder_attention_mask": _valid(100, 1000),
        "encoder_hidden_states_2": noise(1, 256, config.text_embed_2_dim),
        "encoder_attention_mask_2": _valid(1, 256),
        "image_embeds": noise(1, 729, config.image_embed_dim) * 0,
    }


def _cogvideox(config: Any, noise: Noise, f: int, h: int, w: int) -> dict[str, Any]:
    tokens = f * (h // config.patch_size) * (w // config.patch_size)
    return {
        "hidden_states": noise(1, f, config.in_channels, h, w),
        "encoder_hidden_states": noise(1, config.max_text_seq_length, config.text_embed_dim),
        "image_rotary_emb": tuple(noise(tokens, config.attention_head_dim) for _ in range(2)),
    }


def _mochi(config: Any, noise: Noise, f: int, h: int, w: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, config.in_channels, f, h, w),
        "encoder_hidden_states": noise(1, config.max_sequence_length, config.text_embed_dim),
        "encoder_attention_mask": _valid(100, config.max_sequence_length).bool(),
    }


def _ltx2(config: Any, noise: Noise, f: int, h: int, w: int) -> dict[str, Any]:
    sound = 25 * f // 3  # latents of sound for so many of the video
    return {
        "hidden_states": noise(1, f * h * w, config.in_channels),
        "audio_hidden_states": noise(1, sound, config.audio_in_channels),
        "encoder_hidden_states": noise(1, 1024, config.caption_channels),
        "audio_encoder_hidden_states": noise(1, 1024, config.caption_channels),
        "num_frames": f,
        "height": h,
        "width": w,
        "audio_num_frames": sound,
    }


def _cosmos(config: Any, noise: Noise, f: int, h: int, w: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, config.in_channels, f, h, w),
        "encoder_hidden_states": noise(1, 512, config.text_embed_dim),
        "fps": 30,
        "padding_mask": noise(1, 1, 8 * h, 8 * w) * 0,
    }


_TINY = {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 128, "num_layers": 2, "text_dim": 64}
_DUAL = ("num_layers", "num_single_layers")

MODELS = {
    "tiny": Model("WanTransformer3DModel", (9, 64, 64), (4, 8), _wan, _TINY),
    "wan-1.3b": Model("WanTransformer3DModel", (81, 480, 832), (4, 8), _wan,
                      {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
    "wan-14b": Model("WanTransformer3DModel", (81, 720, 1280), (4, 8), _wan),
    "hunyuan-video": Model("HunyuanVideoTransformer3DModel", (129, 720, 1280), (4, 8), _hunyuan, layers=_DUAL),
    "hunyuan-video-1.5": Model("HunyuanVideo15Transformer3DModel", (121, 720, 1280), (4, 16), _hunyuan_15),
    "cogvideox-5b": Model("CogVideoXTransformer3DModel", (49, 480, 720), (4, 8), _cogvideox,
                          {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}),
    "mochi": Model("MochiTransformer3DModel", (163, 480, 848), (6, 8), _mochi),
    "ltx-2": Model("LTX2VideoTransformer3DModel", (121, 1024, 1536), (8, 32), _ltx2),
    "cosmos": Model("CosmosTransformer3DModel", (121, 704, 1280), (8, 8), _cosmos),
}  # fmt: skip
