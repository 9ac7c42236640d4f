"""ComfyUI's video models that are not made of Wan's blocks, at tiny sizes."""

from __future__ import annotations

from typing import Any

import torch
from comfy_tiny import ClipVision, Size, Tiny, randn

_ODD: dict[str, Any] = {"latent": (3, 15, 17), "other": (4, 11, 19), "grid": (3, 8, 9)}
_EVEN: dict[str, Any] = {"latent": (3, 14, 18), "other": (4, 10, 22), "grid": (3, 7, 9)}  # for models that do not pad
_WHOLE: dict[str, Any] = {"latent": (3, 7, 9), "other": (4, 5, 11), "grid": (3, 7, 9)}  # a token is one latent pixel
_USUAL: dict[str, Any] = {"latent": (5, 16, 16), "other": (4, 12, 20), "grid": (5, 8, 8)}


def _guides(latent: Size) -> dict[str, Any]:
    tokens = latent[1] * latent[2]  # one guide frame, the last of the latent
    return {"keyframe_idxs": torch.arange(3 * tokens * 2, dtype=torch.float32).view(1, 3, tokens, 2)}


def _guide_mask(latent: Size) -> torch.Tensor:
    """The guide frame stays as it is, and its first row is dropped."""
    mask = torch.ones(1, 1, *latent)
    mask[:, :, -1] = 0
    mask[:, :, -1, 0] = -1
    return mask


def _hunyuan15(latent: Size) -> dict[str, Any]:
    return {"conditioning_byt5small": randn(1, 6, 1472), "clip_vision_output": ClipVision(4, 1152)}


def _minimax_references(latent: Size) -> dict[str, Any]:
    """A first frame of the video's size, and a reference image of another."""
    height, width = (size + size % 2 for size in latent[1:])
    frame = {"resolved_frame_index": 0, "latent": randn(1, 24, 1, height, width)}
    image = {"kind": "image", "latent_h": 8, "latent_w": 6, "latent": randn(1, 24, 1, 8, 6)}
    return {"minimax_keyframes": [frame], "minimax_refs": [image]}


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
_HUNYUAN15 = {
    **_HUNYUAN,
    "in_channels": 65,
    "out_channels": 32,
    "patch_size": [1, 1, 1],
    "vec_in_dim": None,
    "depth": 3,
    "depth_single_blocks": 0,
    "byt5": True,
    "guidance_embed": False,
    "use_cond_type_embedding": True,
    "vision_in_dim": 1152,
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
_LTXAV = {
    **_LTXV,
    "image_model": "ltxav",
    "audio_in_channels": 128,
    "audio_cross_attention_dim": 32,
    "audio_attention_head_dim": 16,
    "audio_num_attention_heads": 2,
    "connector_attention_head_dim": 16,
    "connector_num_attention_heads": 2,
    "connector_num_layers": 1,
}
_COSMOS = {
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
    "use_adaln_lora": True,
    "adaln_lora_dim": 8,
}
_COSMOS_PREDICT2 = {**_COSMOS, "image_model": "cosmos_predict2", "pos_emb_learnable": True}
_COSMOS1 = {
    **_COSMOS,
    "image_model": "cosmos",
    "block_config": "FA-CA-MLP",
    "block_x_format": "THWBD",
    "affline_emb_norm": True,
    "extra_per_block_abs_pos_emb": True,
    "extra_per_block_abs_pos_emb_type": "learnable",
}
_KANDINSKY = {
    "image_model": "kandinsky5",
    "in_text_dim": 32,
    "in_text_dim2": 24,
    "time_dim": 16,
    "model_dim": 48,
    "ff_dim": 64,
    "visual_embed_dim": 132,
    "num_text_blocks": 2,
    "num_visual_blocks": 3,
    "axes_dims": (8, 8, 8),
}
_COGVIDEO = {
    "image_model": "cogvideox",
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "time_embed_dim": 16,
    "text_embed_dim": 32,
    "num_layers": 3,
    "use_rotary_positional_embeddings": True,
}
_COGVIDEO15 = {**_COGVIDEO, "patch_size_t": 2, "in_channels": 32}
_MINIMAX = {
    "image_model": "minimax_h3",
    "hidden_size": 48,
    "num_layers": 3,
    "token_refiner_num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "ffn_hidden_size": 64,
    "text_dim": 32,
    "timestep_input_dim": 16,
    "time_embed_hidden_size": 16,
    "time_embed_dim": 16,
    "rope_inv_freq_len": 4,
}
_MINIMAX_H3: dict[str, Any] = {
    "config": "MiniMaxH3",
    "unet": _MINIMAX,
    **_ODD,
    "layers": 3,
    "channels": 24,
    "audio": (1, 32, 2, 5),
    "buffers": {"rope.inv_freq": 100.0 ** -torch.linspace(0, 1, 4)},
    "needs": "MiniMaxH3",
    "one_only": True,
    "scale": 0.4,
}

OTHERS = {
    "hunyuan": Tiny(config="HunyuanVideo", unet=_HUNYUAN, **_USUAL, before=7, layers=4),
    "hunyuan_reference": Tiny(
        config="HunyuanVideo",
        unet=_HUNYUAN,
        **_USUAL,
        before=71,
        layers=4,
        conditions=lambda latent: {"ref_latent": randn(1, 16, 1, *latent[1:])},
        cfg=1.0,
        one_only=True,
    ),
    "hunyuan15": Tiny(
        config="HunyuanVideo15",
        unet=_HUNYUAN15,
        **_WHOLE,
        before=7 + 6 + 4,
        layers=3,
        channels=32,
        conditions=_hunyuan15,
    ),
    "mochi": Tiny(config="GenmoMochi", unet=_MOCHI, **_USUAL, after=7, layers=3, channels=12),
    "ltxv": Tiny(config="LTXV", unet=_LTXV, latent=(5, 8, 8), other=(4, 6, 10), grid=(5, 8, 8), layers=3),
    "ltxv_guide": Tiny(
        config="LTXV",
        unet=_LTXV,
        latent=(6, 8, 8),
        other=(5, 6, 10),
        grid=(5, 8, 8),
        after=56,
        layers=3,
        conditions=_guides,
        mask=_guide_mask,
    ),
    "ltxav": Tiny(config="LTXAV", unet=_LTXAV, **_WHOLE, layers=3, text_dim=64, audio=(1, 8, 5, 16)),
    "ltxav_guide": Tiny(
        config="LTXAV",
        unet=_LTXAV,
        latent=(4, 7, 9),
        other=(5, 5, 11),
        grid=(3, 7, 9),
        after=54,
        layers=3,
        text_dim=64,
        audio=(1, 8, 5, 16),
        conditions=_guides,
        mask=_guide_mask,
    ),
    "cosmos1": Tiny(config="CosmosT2V", unet=_COSMOS1, **_EVEN, layers=3),
    "cosmos_predict2": Tiny(config="CosmosT2IPredict2", unet=_COSMOS_PREDICT2, **_USUAL, layers=3),
    "kandinsky5": Tiny(config="Kandinsky5", unet=_KANDINSKY, **_EVEN, layers=3),
    "cogvideox": Tiny(config="CogVideoX_T2V", unet=_COGVIDEO, **_ODD, before=7, layers=3, scale=0.4, needs="CogVideoX"),
    "cogvideox15": Tiny(
        config="CogVideoX_I2V",
        unet=_COGVIDEO15,
        latent=(5, 15, 17),
        other=(3, 11, 19),
        grid=(3, 8, 9),
        before=7,
        layers=3,
        scale=0.4,
        needs="CogVideoX",
    ),
    "minimax": Tiny(**_MINIMAX_H3, before=7 + 10),
    "minimax_references": Tiny(**_MINIMAX_H3, before=7 + 72 + 12 + 10, conditions=_minimax_references),
}
