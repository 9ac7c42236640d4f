"""ComfyUI's models that are made of Wan's blocks, at tiny sizes."""

from __future__ import annotations

from typing import Any

import torch
from comfy_tiny import ClipVision, Size, Tiny, randn

_BASE = {
    "image_model": "wan2.1",
    "dim": 48,
    "ffn_dim": 64,
    "num_heads": 2,
    "num_layers": 3,
    "patch_size": (1, 2, 2),
    "freq_dim": 32,
    "text_dim": 32,
    "out_dim": 16,
}


def _wan(config: str, **settings: Any) -> dict[str, Any]:
    """A model of 5 frames of 8x8 tokens unless said."""
    unet = {**_BASE, **settings.pop("unet")}
    usual = {"latent": (5, 16, 16), "other": (4, 12, 20), "grid": (5, 8, 8), "layers": 3}
    return {"config": config, "unet": unet, **usual, **settings}


_T2V = {"model_type": "t2v", "in_dim": 16}
_ODD: dict[str, Any] = {"latent": (3, 15, 17), "other": (4, 11, 19), "grid": (3, 8, 9)}
# Odd numbers of tokens from sizes that need no padding, for models that pad the video and not what is beside it.
_EVEN: dict[str, Any] = {"latent": (3, 14, 18), "other": (4, 10, 22), "grid": (3, 7, 9)}


def _reference(latent: Size) -> dict[str, Any]:
    return {"reference_latents": [randn(1, 16, 1, *latent[1:])]}


def _vace(latent: Size) -> dict[str, Any]:
    return {
        "vace_frames": [randn(1, 32, *latent)],
        "vace_mask": [torch.ones(1, 64, *latent)],
        "vace_strength": [1.0],
    }


def _camera(latent: Size) -> dict[str, Any]:
    frames, height, width = latent
    return {"camera_conditions": randn(1, 24, frames, 8 * height, 8 * width)}


def _animate(latent: Size) -> dict[str, Any]:
    """A pose for every frame but the first, the character. Faces take seconds, and have a test of their own."""
    frames, *size = latent
    return {"pose_video_latent": randn(1, 16, frames - 1, *size)}


def _speech(latent: Size) -> dict[str, Any]:
    motion = randn(1, 16, 19, *latent[1:], seed=6)
    audio = randn(1, 25, 8, 4 * latent[0], seed=7)
    return {**_reference(latent), "reference_motion": motion, "audio_embed": audio}


def _humo(latent: Size) -> dict[str, Any]:
    return {**_reference(latent), "audio_embed": randn(1, latent[0], 8, 5, 1280, seed=7)}


def _scail(latent: Size) -> dict[str, Any]:
    frames, height, width = latent
    return {**_reference(latent), "pose_video_latent": randn(1, 16, frames, height // 2, width // 2, seed=6)}


def _scail2(latent: Size) -> dict[str, Any]:
    frames, height, width = latent
    made = _scail(latent)
    return {
        **made,
        "reference_latents": [*made["reference_latents"], randn(1, 16, 1, height, width, seed=8)],
        "driving_mask_28ch": randn(1, frames, 28, height // 2, width // 2, seed=9),
        "ref_mask_28ch": randn(1, frames + 2, 28, height, width, seed=9),
        "ref_mask_flag": True,
    }


def _music(latent: Size) -> dict[str, Any]:
    return {
        "audio_embed": randn(1, 12, 35),
        "clip_vision_output": ClipVision(5, 1280),
        "clip_vision_output_ref": ClipVision(4, 1280),
    }


_I2V = {"model_type": "i2v", "in_dim": 36}
_SMALL_SPEECH = {"audio_dim": 8, "audio_inject_layers": [0, 2]}

WAN = {
    "wan_t2v": Tiny(**_wan("WAN21_T2V", unet=_T2V)),
    "wan_t2v_odd": Tiny(**_wan("WAN21_T2V", unet=_T2V, **_ODD)),
    "wan_i2v": Tiny(**_wan("WAN21_I2V", unet=_I2V)),
    "wan_reference": Tiny(**_wan("WAN21_T2V", unet={**_T2V, "in_dim_ref_conv": 16}, before=64, conditions=_reference)),
    "wan_vace": Tiny(
        **_wan(
            "WAN21_Vace",
            unet={"model_type": "vace", "in_dim": 16, "vace_layers": 2, "vace_in_dim": 96, "num_layers": 4},
            layers=6,
            conditions=_vace,
        )
    ),
    "wan_camera": Tiny(
        **_wan("WAN21_Camera", unet={"model_type": "camera", "in_dim": 32}, **_EVEN, conditions=_camera)
    ),
    "wan_subject": Tiny(
        **_wan(
            "WAN21_T2V",
            unet=_T2V,
            after=128,
            conditions=lambda latent: {"time_dim_concat": randn(1, 16, 2, *latent[1:])},
        )
    ),
    "wan_context": Tiny(
        **_wan(
            "WAN21_T2V",
            unet=_T2V,
            after=64,
            conditions=lambda latent: {"context_latents": [randn(1, 16, 1, *latent[1:])]},
            needs="context_latents",
        )
    ),
    "wan_animate": Tiny(
        **_wan(
            "WAN22_Animate",
            unet={"model_type": "animate", "in_dim": 36, "num_layers": 5},
            **_EVEN,
            layers=5,
            conditions=_animate,
        )
    ),
    "wan_s2v": Tiny(
        **_wan(
            "WAN22_S2V",
            unet={"model_type": "s2v", "in_dim": 16, **_SMALL_SPEECH},
            **_EVEN,
            after=63 + 63 + 3 * 4 + 4 * 1 * 2,
            conditions=_speech,
        )
    ),
    "wan_humo": Tiny(
        **_wan("WAN21_HuMo", unet={"model_type": "humo", "in_dim": 16}, **_EVEN, after=63, conditions=_humo)
    ),
    "wan_scail": Tiny(
        **_wan(
            "WAN21_SCAIL",
            unet={"model_type": "scail", "in_dim": 20},
            **_ODD,
            before=72,
            after=3 * 4 * 4,
            conditions=_scail,
        )
    ),
    "wan_scail2": Tiny(
        **_wan(
            "WAN21_SCAIL2",
            unet={"model_type": "scail2", "in_dim": 20},
            **_ODD,
            before=2 * 72,
            after=3 * 4 * 4,
            conditions=_scail2,
            needs="WAN21_SCAIL2",
        )
    ),
    "wan_dancer": Tiny(
        **_wan(
            "WAN22_WanDancer",
            unet={"model_type": "wandancer", "in_dim": 36, "audio_inject_layers": [0, 2]},
            **{**_ODD, "other": (4, 15, 7)},  # the music has 8 parts a frame, which must divide its tokens
            conditions=_music,
            needs="WAN22_WanDancer",
        )
    ),
}
