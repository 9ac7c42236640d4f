"""Tiny pipelines of Cosmos. They run loaded: their guardrail is a package that tests lack, and stands in here."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import torch

from families.text import WIDTH, t5, tokenizer
from families.wan_kin import autoencoder as wan_autoencoder
from families.wan_kin import unipc


class Guardrail(torch.nn.Module):
    """Lets everything pass; its own is 10 GB of weights."""

    dtype, device = torch.float32, torch.device("cpu")

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: np.ndarray) -> np.ndarray:
        return frames


def _transformer(extra: int, **more: Any) -> Any:
    return diffusers.CosmosTransformer3DModel(
        in_channels=4 + extra,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        mlp_ratio=2,
        text_embed_dim=WIDTH,
        adaln_lora_dim=4,
        max_size=(8, 32, 32),
        **more,
    ).eval()


def _parts(transformer: Any, vae: Any, scheduler: Any) -> dict[str, Any]:
    texts = {"text_encoder": t5(), "tokenizer": tokenizer(512)}
    return {**texts, "transformer": transformer, "vae": vae, "scheduler": scheduler, "safety_checker": Guardrail()}


def _first() -> dict[str, Any]:
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(),
        resolution=32,
        num_layers=1,
        latents_mean=[0.0] * 32,
        latents_std=[1.0] * 32,
    )
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002,
        sigma_max=80,
        sigma_data=0.5,
        sigma_schedule="karras",
        prediction_type="epsilon",
        rho=7.0,
        final_sigmas_type="sigma_min",
    )
    return {"vae": vae.eval(), "scheduler": scheduler}


def text_to_world() -> Any:
    return diffusers.CosmosTextToWorldPipeline(**_parts(_transformer(0), **_first()))


def video_to_world() -> Any:
    return diffusers.CosmosVideoToWorldPipeline(**_parts(_transformer(1), **_first()))


def predict_2() -> Any:
    transformer = _transformer(1, extra_pos_embed_type=None, rope_scale=(1.0, 3.0, 3.0))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    return diffusers.Cosmos2VideoToWorldPipeline(**_parts(transformer, wan_autoencoder(), scheduler))


def predict_25() -> Any:
    """Its prompts are embeddings, of 20 channels: its encoder is a Qwen2.5-VL whose processor needs torchvision."""
    config = {"extra_pos_embed_type": None, "use_crossattn_projection": True, "crossattn_proj_in_channels": 20}
    transformer = _transformer(1, **config, encoder_hidden_states_channels=WIDTH)
    parts = _parts(transformer, wan_autoencoder(), unipc())
    return diffusers.Cosmos2_5_PredictBasePipeline(**parts | {"text_encoder": None, "tokenizer": None})


def cosmos_3(sound: bool = False) -> Any:
    heard = {"sound_gen": True, "sound_dim": 4, "sound_latent_fps": 100.0} if sound else {}
    transformer = diffusers.Cosmos3OmniTransformer(
        head_dim=16,
        hidden_size=32,
        intermediate_size=32,
        latent_channel=4,
        latent_patch_size=2,
        num_attention_heads=2,
        num_hidden_layers=1,
        num_key_value_heads=1,
        patch_latent_dim=16,
        vocab_size=50,
        rope_axes_dim=(3, 3, 2),
        rope_scaling={"mrope_section": [3, 3, 2]},
        **heard,
    )
    return diffusers.Cosmos3OmniPipeline(
        transformer=transformer.eval(),
        text_tokenizer=tokenizer(512),
        vae=wan_autoencoder(),
        scheduler=unipc(),
        sound_tokenizer=_sound_tokenizer() if sound else None,
        enable_safety_checker=False,
    )


def cosmos_3_sound() -> Any:
    return cosmos_3(sound=True)


def _sound_tokenizer() -> Any:
    """800 samples a second, 100 latents."""
    from diffusers.models.autoencoders.autoencoder_cosmos3_audio import Cosmos3AVAEAudioTokenizer

    return Cosmos3AVAEAudioTokenizer(
        sampling_rate=800,
        vocoder_input_dim=4,
        dec_dim=4,
        dec_c_mults=(1, 2),
        dec_strides=(2, 4),
        enc_dim=8,
        enc_intermediate_dim=8,
        enc_num_layers=1,
        enc_num_blocks=1,
        enc_n_fft=16,
        enc_hop_length=4,
        enc_latent_dim=8,
        enc_c_mults=(1,),
        enc_strides=(2,),
    ).eval()
