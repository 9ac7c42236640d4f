"""The parts of the demo model: the real classes of a Wan pipeline, at a size that a CPU can train.

Text encoder and transformer are trained together by `train_transformer`, the autoencoder by `train_vae`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
    from transformers import UMT5EncoderModel

LATENT_CHANNELS = 8
TEXT_DIM = 64
FLOW_SHIFT = 3.0
GUIDANCE_SCALE = 2.0
STEPS = 20
"""Sampling settings under which the demo model is measured; stronger guidance distorts its shapes."""


def build_vae() -> AutoencoderKLWan:
    """An untrained autoencoder in the manner of Wan 2.2: 8x in space (2x by patches), 4x in time, 8 latent channels.

    Convolutions start with unit gain and small random biases (black, grey and white must differ after the RMS norms),
    and the posterior starts narrow; with the usual initialisation the first hundreds of steps are lost.
    """
    import torch
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(
        base_dim=24,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
        is_residual=True,
    )
    with torch.no_grad():
        for name, module in vae.named_modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
                gain = 0.3 if name.endswith("conv2") else 1.0
                torch.nn.init.normal_(module.weight, std=gain * module.weight[0].numel() ** -0.5)
                torch.nn.init.normal_(module.bias, std=0.1)
        vae.quant_conv.weight[LATENT_CHANNELS:] *= 0.1
        vae.quant_conv.bias[LATENT_CHANNELS:] = -5.0
    return vae


def build_transformer() -> WanTransformer3DModel:
    """An untrained Wan transformer of 3.9 M parameters: 6 layers of 3 heads of 64 channels, patches (1, 2, 2).

    33 frames of 128x128 pixels are 9 x 8 x 8 = 576 tokens.
    """
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=3,
        attention_head_dim=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=768,
        num_layers=6,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=1024,
    )


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    """An untrained UMT5 encoder: 2 layers, 64 channels."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    return UMT5EncoderModel(config)


def build_scheduler() -> UniPCMultistepScheduler:
    """The scheduler of Wan 2.1 at 480p: UniPC on the flow with shift 3."""
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT)
