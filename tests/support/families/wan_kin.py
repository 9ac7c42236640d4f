"""Tiny pipelines of Wan and its kin, whole: text encoder, autoencoder, transformer of random weights."""

from __future__ import annotations

from typing import Any

import diffusers

from families.text import WIDTH, clip_pictures, clip_vision, tokenizer, umt5

TRANSFORMER: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": WIDTH,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "rope_max_seq_len": 64,
}
PICTURED: dict[str, Any] = {**TRANSFORMER, "in_channels": 12}
SEEN: dict[str, Any] = {**PICTURED, "image_dim": WIDTH, "added_kv_proj_dim": 32}


def autoencoder() -> diffusers.AutoencoderKLWan:
    """4x in time, 8x in space."""
    return diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def unipc() -> diffusers.UniPCMultistepScheduler:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def parts(transformer: Any, scheduler: Any = None, **more: Any) -> dict[str, Any]:
    return {
        "tokenizer": tokenizer(512),
        "text_encoder": umt5(),
        "vae": autoencoder(),
        "scheduler": scheduler or unipc(),
        "transformer": transformer.eval(),
        **more,
    }


def wan() -> Any:
    return diffusers.WanPipeline(**parts(diffusers.WanTransformer3DModel(**TRANSFORMER)))


def wan_5b() -> Any:
    """TI2V-5B: one set of weights for text and for picture."""
    return diffusers.WanPipeline(**parts(diffusers.WanTransformer3DModel(**TRANSFORMER), expand_timesteps=True))


def wan_image() -> Any:
    """Wan 2.2's, without an image encoder."""
    return diffusers.WanImageToVideoPipeline(**parts(diffusers.WanTransformer3DModel(**PICTURED)))


def wan_first_last() -> Any:
    """Wan 2.1's, whose image encoder sees both pictures."""
    eyes = {"image_encoder": clip_vision(), "image_processor": clip_pictures()}
    transformer = diffusers.WanTransformer3DModel(**SEEN, pos_embed_seq_len=10)
    return diffusers.WanImageToVideoPipeline(**parts(transformer, **eyes))


def lucy() -> Any:
    """The latents, and those of the video that is edited."""
    transformer = diffusers.WanTransformer3DModel(**{**TRANSFORMER, "in_channels": 8})
    return diffusers.LucyEditPipeline(**parts(transformer, expand_timesteps=True))


def vace() -> Any:
    # The control has what changes, what stays (4 channels each) and a mask of 64 values a latent pixel.
    transformer = diffusers.WanVACETransformer3DModel(**TRANSFORMER, vace_layers=[0], vace_in_channels=72)
    return diffusers.WanVACEPipeline(**parts(transformer))


def animate() -> Any:
    sizes = {"4": 16, "8": 16, "16": 16}
    transformer = diffusers.WanAnimateTransformer3DModel(
        **SEEN,
        latent_channels=4,
        motion_encoder_channel_sizes=sizes,
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    eyes = {"image_encoder": clip_vision(), "image_processor": clip_pictures()}
    return diffusers.WanAnimatePipeline(**parts(transformer, **eyes))


def chronoedit() -> Any:
    transformer = diffusers.ChronoEditTransformer3DModel(**SEEN)
    eyes = {"image_encoder": clip_vision(), "image_processor": clip_pictures()}
    return diffusers.ChronoEditPipeline(**parts(transformer, **eyes))


def skyreels() -> Any:
    return diffusers.SkyReelsV2Pipeline(**parts(diffusers.SkyReelsV2Transformer3DModel(**TRANSFORMER)))


def skyreels_image() -> Any:
    transformer = diffusers.SkyReelsV2Transformer3DModel(**SEEN)
    eyes = {"image_encoder": clip_vision(), "image_processor": clip_pictures()}
    return diffusers.SkyReelsV2ImageToVideoPipeline(**parts(transformer, **eyes))


def skyreels_forcing() -> Any:
    transformer = diffusers.SkyReelsV2Transformer3DModel(**TRANSFORMER, inject_sample_info=True)
    return diffusers.SkyReelsV2DiffusionForcingPipeline(**parts(transformer))


def anyflow() -> Any:
    transformer = diffusers.AnyFlowTransformer3DModel(**TRANSFORMER)
    return diffusers.AnyFlowPipeline(**parts(transformer, diffusers.FlowMapEulerDiscreteScheduler()))


_HELIOS = {k: v for k, v in TRANSFORMER.items() if k != "rope_max_seq_len"} | {
    "rope_dim": (4, 6, 6),
    "guidance_cross_attn": True,
}


def helios() -> Any:
    transformer = diffusers.HeliosTransformer3DModel(**_HELIOS)
    return diffusers.HeliosPipeline(**parts(transformer, diffusers.FlowMatchEulerDiscreteScheduler()))


def helios_pyramid() -> Any:
    transformer = diffusers.HeliosTransformer3DModel(**_HELIOS)
    return diffusers.HeliosPyramidPipeline(**parts(transformer, diffusers.HeliosScheduler(gamma=0.3)))
