"""Tiny pipelines of LTX-Video and LTX-2, whole, with sound."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

from families.text import WIDTH, llama, t5, tokenizer


def autoencoder() -> diffusers.AutoencoderKLLTXVideo:
    """8x in time, 32x in space."""
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    ).eval()


def _shifting() -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1
    )


def parts(scheduler: Any = None) -> dict[str, Any]:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=WIDTH,
    )
    return {
        "scheduler": scheduler or _shifting(),
        "vae": autoencoder(),
        "text_encoder": t5(),
        "tokenizer": tokenizer(128),
        "transformer": transformer.eval(),
    }


def ltx() -> Any:
    return diffusers.LTXPipeline(**parts())


def ltx_condition() -> Any:
    return diffusers.LTXConditionPipeline(**parts(diffusers.FlowMatchEulerDiscreteScheduler()))


def ltx2() -> Any:
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=16,
        audio_out_channels=16,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=WIDTH,
        rope_double_precision=False,
    )
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH,
        text_proj_in_factor=4,  # the hidden states of three layers, and what goes into the first
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=8,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=8,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
    )
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=16, latent_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, mel_bins=16
    )
    vocoder = LTX2Vocoder(
        in_channels=32,
        hidden_channels=8,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    return diffusers.LTX2Pipeline(
        scheduler=_shifting(),
        vae=vae.eval(),
        audio_vae=audio_vae.eval(),
        text_encoder=llama(),
        tokenizer=tokenizer(1024),
        connectors=connectors.eval(),
        transformer=transformer.eval(),
        vocoder=vocoder.eval(),
    )
