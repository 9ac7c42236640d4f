"""HunyuanVideo and the models with padded text behind the video."""

from __future__ import annotations

import diffusers
import torch

from vidaccel import VideoLayout

from .base import GRID, Tiny, mask, noise

HUNYUAN = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
           "num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1, "text_embed_dim": 16,
           "pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6), "guidance_embeds": True}  # fmt: skip


def given(**more) -> dict:
    return {"hidden_states": noise(1, 4, 3, 8, 12), "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": noise(1, 8, 16), "encoder_attention_mask": mask(5, padded=8),
            "pooled_projections": noise(1, 8), "guidance": torch.tensor([6000.0]), **more}  # fmt: skip


def dual(layers: int) -> dict:
    return {"num_layers": layers - layers // 2, "num_single_layers": layers // 2}


def hunyuan_video(layers: int) -> Tiny:
    model = diffusers.HunyuanVideoTransformer3DModel(**HUNYUAN, **dual(layers))
    return Tiny(model, given(), VideoLayout(*GRID, text_after=5), layers)


def hunyuan_video_i2v(layers: int) -> Tiny:
    model = diffusers.HunyuanVideoTransformer3DModel(**HUNYUAN, **dual(layers), image_condition_type="token_replace")
    return Tiny(model, given(), VideoLayout(*GRID, text_after=5), layers)


def hunyuan_framepack(layers: int) -> Tiny:
    config = {"has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True}
    model = diffusers.HunyuanVideoFramepackTransformer3DModel(**HUNYUAN, **dual(layers), **config)
    more = {"image_embeds": noise(1, 3, 16), "indices_latents": torch.arange(8, 11)}
    for name, first, frames in (("clean", 0, 2), ("history_2x", 2, 2), ("history_4x", 4, 4)):
        more |= {f"latents_{name}": noise(1, 4, frames, 8, 12)}
        more |= {f"indices_latents_{name}": torch.arange(first, first + frames)}
    # History of 2x4x6, 1x2x3 and 1x1x2 tokens; a picture of 3.
    return Tiny(model, given(**more), VideoLayout(*GRID, text_before=48 + 6 + 2, text_after=3 + 5), layers)


def hunyuan_video_15(layers: int, picture: bool = False) -> Tiny:
    model = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=layers,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, text_embed_dim=16, text_embed_2_dim=12,
        image_embed_dim=10, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    # Its width is 2,048 whatever the config says: more weights, by far, than in all else.
    model.context_embedder_2 = type(model.context_embedder_2)(12, 32, 32)
    more = {"hidden_states": noise(1, 9, 3, 4, 6), "timestep": torch.tensor([500.0])}
    more |= {"encoder_hidden_states": noise(1, 8, 16), "encoder_attention_mask": mask(5, padded=8)}
    more |= {"encoder_hidden_states_2": noise(1, 6, 12), "encoder_attention_mask_2": mask(2, padded=6)}
    more |= {"image_embeds": noise(1, 4, 10) if picture else torch.zeros(1, 4, 10)}
    return Tiny(model, more, VideoLayout(*GRID, text_after=7 + 4 * picture), layers, patch=(1, 1, 1))


def hunyuan_video_15_i2v(layers: int) -> Tiny:
    return hunyuan_video_15(layers, picture=True)


def motif_video(layers: int, decoders: int = 1) -> Tiny:
    """The last blocks are a decoder, which stays dense."""
    model = diffusers.MotifVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=layers - 1,
        num_single_layers=1 + decoders, num_decoder_layers=decoders, text_embed_dim=16, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    names = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask")
    more = {name: value for name, value in given().items() if name in names}
    return Tiny(model, more, VideoLayout(*GRID, text_after=5), layers)


BUILDERS = {f.__name__: f for f in (hunyuan_video, hunyuan_video_i2v, hunyuan_framepack, hunyuan_video_15,
                                    hunyuan_video_15_i2v, motif_video)}  # fmt: skip
