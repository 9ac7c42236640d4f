"""Wan and the models that were made from it."""

from __future__ import annotations

import diffusers
import torch

from vidaccel import VideoLayout

from .base import GRID, Tiny, noise

WAN = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 16,
       "freq_dim": 32, "ffn_dim": 32, "cross_attn_norm": True, "rope_max_seq_len": 64}  # fmt: skip
PICTURE = {**WAN, "in_channels": 9, "image_dim": 16, "added_kv_proj_dim": 32}
TIME, VIDEO, TEXT = torch.tensor([500]), (1, 4, 3, 8, 12), (1, 7, 16)


def given(channels: int = 4, **more) -> dict:
    latents = noise(1, channels, *VIDEO[2:])
    return {"hidden_states": latents, "timestep": TIME, "encoder_hidden_states": noise(*TEXT), **more}


def wan(layers: int) -> Tiny:
    return Tiny(diffusers.WanTransformer3DModel(**WAN, num_layers=layers), given(), VideoLayout(*GRID), layers)


def wan_5b(layers: int) -> Tiny:
    """TI2V: a timestep for each token, 0 for those of the picture."""
    tiny = wan(layers)
    time = torch.full((1, 72), 500)
    time[:, :24] = 0
    tiny.given["timestep"] = time
    return tiny


def with_picture(cls: type, layers: int) -> Tiny:
    model = cls(**PICTURE, num_layers=layers)
    more = {"encoder_hidden_states": noise(1, 512, 16), "encoder_hidden_states_image": noise(1, 5, 16)}
    return Tiny(model, given(9, **more), VideoLayout(*GRID), layers)


def wan_i2v(layers: int) -> Tiny:
    return with_picture(diffusers.WanTransformer3DModel, layers)


def chronoedit(layers: int) -> Tiny:
    return with_picture(diffusers.ChronoEditTransformer3DModel, layers)


def wan_vace(layers: int, control: list[int] | None = None) -> Tiny:
    """Control behind every second block, or the given ones."""
    control = list(range(0, layers, 2)) if control is None else control
    model = diffusers.WanVACETransformer3DModel(**WAN, num_layers=layers, vace_layers=control, vace_in_channels=6)
    more = {"control_hidden_states": noise(1, 6, *VIDEO[2:])}
    return Tiny(model, given(**more), VideoLayout(*GRID), layers + len(control))


def wan_animate(layers: int) -> Tiny:
    model = diffusers.WanAnimateTransformer3DModel(
        **{**PICTURE, "in_channels": 12}, num_layers=layers, latent_channels=4, motion_encoder_size=16,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16}, motion_style_dim=8, motion_dim=4,
        motion_encoder_dim=16, face_encoder_hidden_dim=16, face_encoder_num_heads=2, inject_face_latents_blocks=2,
    )  # fmt: skip
    more = {"encoder_hidden_states": noise(1, 512, 16), "encoder_hidden_states_image": noise(1, 5, 16)}
    more |= {"pose_hidden_states": noise(1, 4, 2, 8, 12), "face_pixel_values": noise(1, 3, 5, 16, 16)}
    return Tiny(model, given(12, **more), VideoLayout(*GRID), layers)


def skyreels_v2(layers: int) -> Tiny:
    return Tiny(diffusers.SkyReelsV2Transformer3DModel(**WAN, num_layers=layers), given(), VideoLayout(*GRID), layers)


def skyreels_v2_forcing(layers: int) -> Tiny:
    """Diffusion forcing: a noise level for each frame."""
    model = diffusers.SkyReelsV2Transformer3DModel(**WAN, num_layers=layers, inject_sample_info=True)
    more = {"timestep": torch.tensor([[300, 500, 700]]), "enable_diffusion_forcing": True, "fps": [0]}
    return Tiny(model, given(**more), VideoLayout(*GRID), layers)


def skyreels_v2_causal(layers: int) -> Tiny:
    """Blocks of frames that do not see later ones: a mask of all pairs, so all calls stay dense."""
    tiny = skyreels_v2_forcing(layers)
    tiny.model._set_ar_attention(2)
    tiny.given |= {"hidden_states": noise(1, 4, 4, 8, 12), "timestep": torch.tensor([[300, 300, 700, 700]])}
    tiny.layout, tiny.layers = VideoLayout(4, 4, 6), 0
    return tiny


def anyflow(layers: int) -> Tiny:
    more = {"hidden_states": noise(1, 3, 4, 8, 12), "timestep": torch.full((1, 3), 500.0)}
    more |= {"r_timestep": torch.full((1, 3), 400.0)}
    model = diffusers.AnyFlowTransformer3DModel(**WAN, num_layers=layers)
    return Tiny(model, given(**more), VideoLayout(*GRID), layers, axes=(1, 3, 4))


def helios(layers: int) -> Tiny:
    config = {name: value for name, value in WAN.items() if name != "rope_max_seq_len"}
    config |= {"rope_dim": (4, 6, 6), "guidance_cross_attn": True, "is_amplify_history": True}
    model = diffusers.HeliosTransformer3DModel(**config, num_layers=layers)
    history = {"short": 2, "mid": 2, "long": 4}  # latent frames: 2x4x6, 1x2x3 and 1x1x2 tokens
    more = {f"latents_history_{name}": noise(1, 4, frames, 8, 12) for name, frames in history.items()}
    more |= {"indices_hidden_states": torch.arange(8, 11)[None]}
    for name, first in (("short", 6), ("mid", 4), ("long", 0)):
        more[f"indices_latents_history_{name}"] = torch.arange(first, first + history[name])[None]
    return Tiny(model, given(**more), VideoLayout(*GRID, text_before=48 + 6 + 2), layers)


BUILDERS = {f.__name__: f for f in (wan, wan_5b, wan_i2v, wan_vace, wan_animate, chronoedit, skyreels_v2,
                                    skyreels_v2_forcing, skyreels_v2_causal, anyflow, helios)}  # fmt: skip
