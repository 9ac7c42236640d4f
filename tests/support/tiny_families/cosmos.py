"""Cosmos 1, Predict2, 2.5 and 3."""

from __future__ import annotations

import diffusers
import torch
from no_torchvision import where_it_is_missing

from vidaccel import VideoLayout

from .base import GRID, Tiny, noise

where_it_is_missing()

COSMOS = {"out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "mlp_ratio": 2, "text_embed_dim": 16,
          "adaln_lora_dim": 4, "max_size": (8, 32, 32)}  # fmt: skip


def given(**more) -> dict:
    return {"hidden_states": noise(1, 4, 3, 8, 12), "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": noise(1, 7, 16), "padding_mask": torch.zeros(1, 1, 64, 96), **more}  # fmt: skip


def conditioned(**more) -> dict:
    return given(condition_mask=torch.zeros(1, 1, 3, 8, 12), **more)


def cosmos_1(layers: int) -> Tiny:
    model = diffusers.CosmosTransformer3DModel(**COSMOS, in_channels=4, num_layers=layers)
    return Tiny(model, given(fps=30), VideoLayout(*GRID), layers)


def cosmos_predict2(layers: int) -> Tiny:
    config = {"extra_pos_embed_type": None, "rope_scale": (1.0, 3.0, 3.0)}
    model = diffusers.CosmosTransformer3DModel(**COSMOS, **config, in_channels=5, num_layers=layers)
    more = {"fps": 16, "timestep": torch.full((1, 1, 3, 1, 1), 0.5)}
    return Tiny(model, conditioned(**more), VideoLayout(*GRID), layers)


def cosmos_25(layers: int) -> Tiny:
    config = {"extra_pos_embed_type": None, "use_crossattn_projection": True, "crossattn_proj_in_channels": 20}
    config |= {"encoder_hidden_states_channels": 16}
    model = diffusers.CosmosTransformer3DModel(**COSMOS, **config, in_channels=5, num_layers=layers)
    return Tiny(model, conditioned(encoder_hidden_states=noise(1, 7, 20)), VideoLayout(*GRID), layers)


def cosmos_25_picture(layers: int) -> Tiny:
    """Transfer 2.5: cross-attention reads text and a picture."""
    config = {"extra_pos_embed_type": None, "img_context_dim_in": 12, "img_context_dim_out": 32}
    config |= {"img_context_num_tokens": 3}
    model = diffusers.CosmosTransformer3DModel(**COSMOS, **config, in_channels=5, num_layers=layers)
    texts = (noise(1, 7, 16), noise(1, 3, 12))
    return Tiny(model, conditioned(encoder_hidden_states=texts), VideoLayout(*GRID), layers)


def cosmos_3(layers: int) -> Tiny:
    """Two query heads for each head of keys and values; keys begin with the understanding tokens."""
    model = diffusers.Cosmos3OmniTransformer(
        head_dim=16, hidden_size=32, intermediate_size=32, latent_channel=4, latent_patch_size=2,
        num_attention_heads=2, num_hidden_layers=layers, num_key_value_heads=1, patch_latent_dim=16, vocab_size=50,
        rope_axes_dim=(3, 3, 2), rope_scaling={"mrope_section": [3, 3, 2]},
    )  # fmt: skip
    text, video = 6, 72
    rows = torch.arange(text, text + video)
    more = {"input_ids": torch.arange(text), "text_indexes": torch.arange(text), "und_len": text,
            "position_ids": torch.arange(text + video)[None].expand(3, -1).contiguous(),
            "sequence_length": text + video, "vision_tokens": [noise(1, 4, 3, 8, 12)], "vision_token_shapes": [GRID],
            "vision_sequence_indexes": rows, "vision_mse_loss_indexes": rows,
            "vision_timesteps": torch.full((video,), 500.0),
            "vision_noisy_frame_indexes": [torch.arange(3)]}  # fmt: skip
    layout = VideoLayout(*GRID, text_before=text)
    return Tiny(model, more, layout, layers, latent="vision_tokens", output=lambda out: out[0][0])


BUILDERS = {f.__name__: f for f in (cosmos_1, cosmos_predict2, cosmos_25, cosmos_25_picture, cosmos_3)}
