"""The real native models of ComfyUI at tiny sizes with random weights, sampled in this process.

Importing this module imports ComfyUI from `COMFYUI_PATH`, on the CPU.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

sys.path.insert(0, os.environ["COMFYUI_PATH"])

import comfy.options
from comfy.cli_args import args

args.cpu = True
args.use_pytorch_cross_attention = True  # as on every GPU; the CPU's default cannot do LTX-Video's text masks

import comfy.model_base  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.supported_models as supported  # noqa: E402

_WAN = {
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


@dataclass(frozen=True)
class Tiny:
    """One native model.

    Args:
        config: ComfyUI's class of supported models. unet: its settings.
        channels: of the latent. text_dim: of the text condition.
        latent: `(T, H, W)`.
        conditions: further entries of a conditioning, made for a latent. mask: of the latent, likewise.
        cfg: guidance scale; 1 calls the positive branch alone.
        tokens: `(before, video, after)` of its self-attention, text included.
        layers: self-attention calls over the video in one forward pass.
    """

    config: str
    unet: dict[str, Any]
    channels: int
    text_dim: int
    latent: tuple[int, int, int]
    tokens: tuple[int, int, int]
    layers: int
    text: int = 7
    conditions: Callable[[tuple[int, int, int]], dict[str, Any]] = field(default=lambda latent: {})
    mask: Callable[[tuple[int, int, int]], torch.Tensor] | None = None
    cfg: float = 3.0


def _reference(latent):
    return {"reference_latents": [torch.randn(1, 16, 1, *latent[1:], generator=_generator(5))]}


def _vace(latent):
    frames = torch.randn(1, 32, *latent, generator=_generator(5))
    return {"vace_frames": [frames], "vace_mask": [torch.ones(1, 64, *latent)], "vace_strength": [1.0]}


def _subject(latent):
    return {"time_dim_concat": torch.randn(1, 16, 2, *latent[1:], generator=_generator(5))}


def _context(latent):
    return {"context_latents": [torch.randn(1, 16, 1, *latent[1:], generator=_generator(5))]}


def _hunyuan_reference(latent):
    return {"ref_latent": torch.randn(1, 16, 1, *latent[1:], generator=_generator(5))}


def _guides(latent):
    tokens = latent[1] * latent[2]  # one guide frame, the last of the latent
    return {"keyframe_idxs": torch.arange(3 * tokens * 2, dtype=torch.float32).view(1, 3, tokens, 2)}


def _guide_mask(latent):
    """The guide frame stays as it is, and its first row is dropped."""
    mask = torch.ones(1, 1, *latent)
    mask[:, :, -1] = 0
    mask[:, :, -1, 0] = -1
    return mask


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


_T2V = {**_WAN, "model_type": "t2v", "in_dim": 16}
_HUNYUAN = {
    "image_model": "hunyuan_video",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "vec_in_dim": 24,
    "axes_dim": [4, 10, 10],
    "context_in_dim": 32,
    "hidden_size": 48,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "theta": 256,
    "qkv_bias": True,
    "byt5": False,
    "guidance_embed": True,
    "meanflow": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}
_MOCHI = {
    "image_model": "mochi_preview",
    "depth": 3,
    "num_heads": 2,
    "hidden_size_x": 48,
    "hidden_size_y": 24,
    "mlp_ratio_x": 256.0,  # the class insists on the hidden size of the published model
    "mlp_ratio_y": 4.0,
    "learn_sigma": False,
    "in_channels": 12,
    "use_t5": True,
    "qk_norm": True,
    "qkv_bias": False,
    "out_bias": True,
    "attn_drop": 0.0,
    "patch_embed_bias": True,
    "posenc_preserve_area": True,
    "timestep_mlp_bias": True,
    "attend_to_padding": False,
    "t5_feat_dim": 32,
    "t5_token_length": 16,
    "rope_theta": 10000.0,
}
_LTXV = {
    "image_model": "ltxv",
    "in_channels": 16,
    "cross_attention_dim": 48,
    "attention_head_dim": 24,
    "num_attention_heads": 2,
    "caption_channels": 32,
    "num_layers": 3,
}
_COSMOS = {
    "image_model": "cosmos_predict2",
    "max_img_h": 32,
    "max_img_w": 32,
    "max_frames": 16,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "concat_padding_mask": True,
    "model_channels": 48,
    "num_blocks": 3,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "crossattn_emb_channels": 32,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": True,
    "use_adaln_lora": True,
    "adaln_lora_dim": 8,
}

MODELS = {
    "wan_t2v": Tiny("WAN21_T2V", _T2V, 16, 32, (5, 16, 16), (0, 320, 0), 3),
    "wan_t2v_odd": Tiny("WAN21_T2V", _T2V, 16, 32, (3, 15, 17), (0, 216, 0), 3),
    "wan_i2v": Tiny("WAN21_I2V", {**_WAN, "model_type": "i2v", "in_dim": 36}, 16, 32, (5, 16, 16), (0, 320, 0), 3),
    "wan_reference": Tiny(
        "WAN21_T2V", {**_T2V, "in_dim_ref_conv": 16}, 16, 32, (5, 16, 16), (64, 320, 0), 3, conditions=_reference
    ),
    "wan_vace": Tiny(
        "WAN21_Vace",
        {**_WAN, "model_type": "vace", "in_dim": 16, "vace_layers": 2, "vace_in_dim": 96, "num_layers": 4},
        16,
        32,
        (5, 16, 16),
        (0, 320, 0),
        6,
        conditions=_vace,
    ),
    "wan_subject": Tiny("WAN21_T2V", _T2V, 16, 32, (5, 16, 16), (0, 320, 128), 3, conditions=_subject),
    "wan_context": Tiny("WAN21_T2V", _T2V, 16, 32, (5, 16, 16), (0, 320, 64), 3, conditions=_context),
    "hunyuan": Tiny("HunyuanVideo", _HUNYUAN, 16, 32, (5, 16, 16), (7, 320, 0), 4),
    "hunyuan_reference": Tiny(
        "HunyuanVideo", _HUNYUAN, 16, 32, (5, 16, 16), (71, 320, 0), 4, conditions=_hunyuan_reference, cfg=1.0
    ),
    "mochi": Tiny("GenmoMochi", _MOCHI, 12, 32, (5, 16, 16), (0, 320, 7), 3),
    "ltxv": Tiny("LTXV", _LTXV, 16, 32, (5, 8, 8), (0, 320, 0), 3),
    "ltxv_guide": Tiny("LTXV", _LTXV, 16, 32, (6, 8, 8), (0, 320, 56), 3, conditions=_guides, mask=_guide_mask),
    "cosmos_predict2": Tiny("CosmosT2IPredict2", _COSMOS, 16, 32, (5, 16, 16), (0, 320, 0), 3),
}

if "context_latents" not in inspect.getsource(comfy.model_base.WAN21):
    del MODELS["wan_context"]  # came after ComfyUI 0.19


def build(tiny: Tiny) -> comfy.model_patcher.ModelPatcher:
    """A MODEL with random weights."""
    config = getattr(supported, tiny.config)(dict(tiny.unet))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="cpu")
    generator = _generator(0)
    with torch.no_grad():
        for weight in model.diffusion_model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * (0.15 if weight.ndim > 1 else 0.05))
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)


def conditioning(tiny: Tiny, seed: int, latent: tuple[int, int, int], text: int | None = None) -> list:
    """A positive or negative prompt."""
    values = {"pooled_output": torch.randn(1, 24, generator=_generator(seed + 50)), **tiny.conditions(latent)}
    tokens = torch.randn(1, text or tiny.text, tiny.text_dim, generator=_generator(seed))
    if tiny.config in ("GenmoMochi", "LTXV"):
        values["attention_mask"] = torch.ones(1, text or tiny.text, dtype=torch.long)
    return [[tokens, values]]


def sample(
    model: Any, tiny: Tiny, *, latent: tuple[int, int, int] | None = None, steps: int = 4, **options: Any
) -> torch.Tensor:
    """KSampler's work: a sampled latent `[1, C, T, H, W]`."""
    latent = latent or tiny.latent
    empty = torch.zeros(options.pop("batch", 1), tiny.channels, *latent)
    noise = comfy.sample.prepare_noise(empty, options.get("seed", 0))
    positive, negative = (conditioning(tiny, seed, latent) for seed in (1, 2))
    settings = {"denoise": 1.0, "seed": 0, "disable_pbar": True} | options
    if tiny.mask is not None:
        settings["noise_mask"] = tiny.mask(latent)
    with torch.inference_mode():
        return comfy.sample.sample(
            model,
            noise,
            steps,
            tiny.cfg,
            settings.pop("sampler", "euler"),
            "simple",
            positive,
            negative,
            empty,
            **settings,
        )
