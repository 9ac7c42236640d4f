"""Tiny pipelines of Allegro, Mochi and Motif-Video, whole."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.guiders import ClassifierFreeGuidance

from families.text import WIDTH, siglip_pictures, siglip_vision, t5, tokenizer
from families.wan_kin import autoencoder as wan_autoencoder


def mochi() -> Any:
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        pooled_projection_dim=16,
        in_channels=12,  # what the pipeline expects
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        max_sequence_length=256,
    )
    torch.nn.init.normal_(transformer.pos_frequencies)
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=12,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    return diffusers.MochiPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=vae.eval(),
        text_encoder=t5(),
        tokenizer=tokenizer(256),
        transformer=transformer.eval(),
    )


def allegro() -> Any:
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=24,
        sample_height=40,
        sample_width=40,
        sample_frames=6,
        caption_channels=WIDTH,
    )
    vae = diffusers.AutoencoderKLAllegro(block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2)
    return diffusers.AllegroPipeline(
        tokenizer=tokenizer(512),
        text_encoder=t5(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(),
    )


def motif() -> Any:
    transformer = diffusers.MotifVideoTransformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_decoder_layers=1,
        text_embed_dim=WIDTH,
        image_embed_dim=WIDTH,
        rope_axes_dim=(4, 6, 6),
    )
    text_encoder = t5()
    text_encoder.vision_tower = siglip_vision()  # a part of its T5Gemma 2, which is not saved with this one
    return diffusers.MotifVideoPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=wan_autoencoder(),
        text_encoder=text_encoder,
        tokenizer=tokenizer(512),
        transformer=transformer.eval(),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
        feature_extractor=siglip_pictures(),
    )
