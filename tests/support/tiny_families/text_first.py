"""CogVideoX, EasyAnimate and Mochi: text in the sequence, attention straight from torch."""

from __future__ import annotations

import diffusers
import torch

from vidaccel import VideoLayout

from .base import GRID, Tiny, mask, noise

COGVIDEOX = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
             "time_embed_dim": 8, "text_embed_dim": 16, "sample_width": 12, "sample_height": 8, "sample_frames": 9,
             "patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": 6}  # fmt: skip


def cogvideox(layers: int, cls: type, frames: int = 3, rotary: int = 72, **config) -> Tiny:
    model = cls(**COGVIDEOX, **config, num_layers=layers)
    given = {"hidden_states": noise(1, frames, 4, 8, 12), "encoder_hidden_states": noise(1, 6, 16)}
    given |= {"timestep": torch.tensor([500])}
    if rotary:
        given["image_rotary_emb"] = (noise(rotary, 16), noise(rotary, 16))
    if "ofs_embed_dim" in config:
        given["ofs"] = torch.tensor([2.0])
    patch = (config.get("patch_size_t", 1), 2, 2)
    layout = VideoLayout(frames // patch[0], 4, 6, text_before=6)
    return Tiny(model, given, layout, layers, axes=(1, 3, 4), patch=patch)


def cogvideox_2b(layers: int) -> Tiny:
    return cogvideox(layers, diffusers.CogVideoXTransformer3DModel, rotary=0)


def cogvideox_5b(layers: int) -> Tiny:
    return cogvideox(layers, diffusers.CogVideoXTransformer3DModel, use_rotary_positional_embeddings=True)


def cogvideox_15(layers: int) -> Tiny:
    config = {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "ofs_embed_dim": 8}
    return cogvideox(layers, diffusers.CogVideoXTransformer3DModel, frames=4, rotary=48, **config)


def consisid(layers: int) -> Tiny:
    """With a face, which the model's own loop adds behind every second block, as in the published weights."""
    face = {"id_dim": 12, "vit_dim": 8, "depth": 1, "num_scale": 1, "dim_head": 4, "num_heads": 2, "num_id_token": 2}
    face |= {"num_querie": 3, "output_dim": 21, "ff_mult": 1}
    config = {f"LFE_{name}": value for name, value in face.items()}
    config |= {"is_train_face": True, "cross_attn_dim_head": 8, "cross_attn_num_heads": 2}
    tiny = cogvideox(layers, diffusers.ConsisIDTransformer3DModel, use_rotary_positional_embeddings=True, **config)
    tiny.given |= {"id_cond": noise(1, 12), "id_vit_hidden": [noise(1, 5, 8)]}
    return tiny


def easyanimate(layers: int) -> Tiny:
    """Its first block has projections of its own for text, the others have not."""
    model = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, sample_width=12,
        sample_height=8, num_layers=layers, mmdit_layers=1, time_embed_dim=8, text_embed_dim=16,
    )  # fmt: skip
    given = {"hidden_states": noise(1, 4, 3, 8, 12), "timestep": torch.tensor([500])}
    given["encoder_hidden_states"] = noise(1, 7, 16)
    return Tiny(model, given, VideoLayout(*GRID, text_before=7), layers)


def mochi(layers: int) -> Tiny:
    model = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=16, num_layers=layers, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=16, time_embed_dim=8, max_sequence_length=8,
    )  # fmt: skip
    torch.nn.init.normal_(model.pos_frequencies)
    given = {"hidden_states": noise(1, 4, 3, 8, 12), "encoder_hidden_states": noise(1, 8, 16)}
    given |= {"timestep": torch.tensor([500]), "encoder_attention_mask": mask(5, padded=8).bool()}
    return Tiny(model, given, VideoLayout(*GRID, text_after=5), layers)


BUILDERS = {f.__name__: f for f in (cogvideox_2b, cogvideox_5b, cogvideox_15, consisid, easyanimate, mochi)}
