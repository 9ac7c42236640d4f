"""Tiny pipelines of CogVideoX, ConsisID and EasyAnimate, whole."""

from __future__ import annotations

from typing import Any

import diffusers

from families.text import WIDTH, llama, t5, tokenizer

TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": WIDTH,
    "num_layers": 1,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": 226,
}


def autoencoder() -> diffusers.AutoencoderKLCogVideoX:
    """4x in time, 8x in space."""
    return diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
    ).eval()


def parts(transformer: Any, **more: Any) -> dict[str, Any]:
    return {
        "tokenizer": tokenizer(226),
        "text_encoder": t5(),
        "vae": autoencoder(),
        "transformer": transformer.eval(),
        "scheduler": diffusers.CogVideoXDDIMScheduler(),
        **more,
    }


def cogvideox_2b() -> Any:
    return diffusers.CogVideoXPipeline(**parts(diffusers.CogVideoXTransformer3DModel(**TRANSFORMER)))


def cogvideox_5b() -> Any:
    transformer = diffusers.CogVideoXTransformer3DModel(**TRANSFORMER, use_rotary_positional_embeddings=True)
    scheduler = diffusers.CogVideoXDPMScheduler(timestep_spacing="trailing")
    return diffusers.CogVideoXPipeline(**parts(transformer, scheduler=scheduler))


_FILLED = {"use_rotary_positional_embeddings": True, "patch_size_t": 2}


def cogvideox_15() -> Any:
    transformer = diffusers.CogVideoXTransformer3DModel(**TRANSFORMER, **_FILLED)
    return diffusers.CogVideoXPipeline(**parts(transformer))


def cogvideox_image() -> Any:
    transformer = diffusers.CogVideoXTransformer3DModel(**{**TRANSFORMER, "in_channels": 8})
    return diffusers.CogVideoXImageToVideoPipeline(**parts(transformer))


def cogvideox_15_image() -> Any:
    transformer = diffusers.CogVideoXTransformer3DModel(**{**TRANSFORMER, "in_channels": 8}, **_FILLED, ofs_embed_dim=8)
    return diffusers.CogVideoXImageToVideoPipeline(**parts(transformer))


def cogvideox_video() -> Any:
    return diffusers.CogVideoXVideoToVideoPipeline(**parts(diffusers.CogVideoXTransformer3DModel(**TRANSFORMER)))


def cogvideox_15_video() -> Any:
    transformer = diffusers.CogVideoXTransformer3DModel(**TRANSFORMER, **_FILLED)
    return diffusers.CogVideoXVideoToVideoPipeline(**parts(transformer))


def cogvideox_control() -> Any:
    transformer = diffusers.CogVideoXTransformer3DModel(**{**TRANSFORMER, "in_channels": 8})
    return diffusers.CogVideoXFunControlPipeline(**parts(transformer))


def without_opencv(monkeypatch: Any) -> None:
    """diffusers hides ConsisID's pipeline where OpenCV, which it needs for faces alone, is not installed."""
    from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline

    monkeypatch.setattr(diffusers, "ConsisIDPipeline", ConsisIDPipeline)


def consisid() -> Any:
    transformer = diffusers.ConsisIDTransformer3DModel(
        **{**TRANSFORMER, "in_channels": 8}, use_rotary_positional_embeddings=True
    )
    return diffusers.ConsisIDPipeline(**parts(transformer))


def _easyanimate(channels: int) -> dict[str, Any]:
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=4,
        patch_size=2,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=8,
        text_embed_dim=WIDTH,
    )
    vae = diffusers.AutoencoderKLMagvit(
        latent_channels=4, block_out_channels=[8, 8, 8, 8], layers_per_block=1, norm_num_groups=4
    )
    vae.register_to_config(cache_mag_vae=True)  # as the published configs have it
    own = {
        "vae": vae.eval(),
        "text_encoder": llama(),
        "tokenizer": tokenizer(256),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
    }
    return parts(transformer, **own)


def easyanimate() -> Any:
    return diffusers.EasyAnimatePipeline(**_easyanimate(4))


def easyanimate_inpaint() -> Any:
    """The latents, the mask of the known frames (one channel), and the known frames."""
    return diffusers.EasyAnimateInpaintPipeline(**_easyanimate(9))
