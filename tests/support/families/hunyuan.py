"""Tiny pipelines of HunyuanVideo, SkyReels V1, Framepack and HunyuanVideo 1.5, whole."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers.guiders import ClassifierFreeGuidance

from families.text import WIDTH, clip_pictures, clip_text, llama, siglip_pictures, siglip_vision, t5, tokenizer

TRANSFORMER: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "text_embed_dim": WIDTH,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
    "guidance_embeds": True,
}


def autoencoder() -> diffusers.AutoencoderKLHunyuanVideo:
    """4x in time, 8x in space."""
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).eval()


def parts(transformer: Any, **more: Any) -> dict[str, Any]:
    return {
        "text_encoder": llama(),
        "tokenizer": tokenizer(512),
        "text_encoder_2": clip_text(),
        "tokenizer_2": tokenizer(77),
        "transformer": transformer.eval(),
        "vae": autoencoder(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        **more,
    }


def hunyuan() -> Any:
    return diffusers.HunyuanVideoPipeline(**parts(diffusers.HunyuanVideoTransformer3DModel(**TRANSFORMER)))


def _seeing(condition: str, **changes: Any) -> Any:
    """Image to video: the text encoder sees the picture, through the 576 tokens that the pipeline expects."""
    words = tokenizer(2048)
    signs = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>")
    words.add_tokens([transformers.AddedToken(sign, special=True) for sign in signs])
    block = {"hidden_size": WIDTH, "intermediate_size": 16, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**block, num_hidden_layers=2, image_size=336, patch_size=14),
        text_config=transformers.LlamaConfig(
            **block, num_hidden_layers=3, num_key_value_heads=2, vocab_size=len(words), pad_token_id=0
        ),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
    )
    transformer = diffusers.HunyuanVideoTransformer3DModel(**{**TRANSFORMER, **changes}, image_condition_type=condition)
    own = {
        "text_encoder": transformers.LlavaForConditionalGeneration(config).eval(),
        "tokenizer": words,
        "image_processor": clip_pictures(336),
    }
    return diffusers.HunyuanVideoImageToVideoPipeline(**parts(transformer, **own))


def hunyuan_image() -> Any:
    """The first model, which gets the picture beside its latents."""
    return _seeing("latent_concat", in_channels=9, guidance_embeds=False)


def hunyuan_image_replaced() -> Any:
    """The second one, whose first latent frame is the picture."""
    return _seeing("token_replace")


def skyreels_v1() -> Any:
    transformer = diffusers.HunyuanVideoTransformer3DModel(**{**TRANSFORMER, "in_channels": 8})
    return diffusers.HunyuanSkyreelsImageToVideoPipeline(**parts(transformer))


def framepack() -> Any:
    transformer = diffusers.HunyuanVideoFramepackTransformer3DModel(
        **TRANSFORMER, has_image_proj=True, image_proj_dim=WIDTH, has_clean_x_embedder=True
    )
    eyes = {"image_encoder": siglip_vision(), "feature_extractor": siglip_pictures()}
    return diffusers.HunyuanVideoFramepackPipeline(**parts(transformer, **eyes))


def _parts_15(**more: Any) -> dict[str, Any]:
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        text_embed_2_dim=12,
        image_embed_dim=WIDTH,
        rope_axes_dim=(4, 6, 6),
        target_size=64,
    )
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16, 16, 16, 16, 16), layers_per_block=1
    )
    own = {
        "text_encoder_2": t5(12),
        "tokenizer_2": tokenizer(256),
        "tokenizer": tokenizer(2048, before=60),
        "vae": vae.eval(),
        "guider": ClassifierFreeGuidance(guidance_scale=6.0),
    }
    return parts(transformer, **own, **more)


def _few_tokens(pipe: Any) -> Any:
    """Prompts of 128 and 32 tokens and pictures of 9, in place of 1,000, 256 and 729: most of a tiny run."""
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length, pipe.vision_num_semantic_tokens = 128, 32, 9
    return pipe


def hunyuan_15() -> Any:
    return _few_tokens(diffusers.HunyuanVideo15Pipeline(**_parts_15()))


def hunyuan_15_image() -> Any:
    eyes = {"image_encoder": siglip_vision(), "feature_extractor": siglip_pictures()}
    return _few_tokens(diffusers.HunyuanVideo15ImageToVideoPipeline(**_parts_15(**eyes)))
