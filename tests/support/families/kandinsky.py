"""Tiny pipelines of Kandinsky 5 and 6. They run loaded: their tokenizer is a processor that needs torchvision."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from families.hunyuan import autoencoder
from families.text import WIDTH, clip_text, llama, tokenizer


class Processor:
    """What the pipelines ask of Qwen2.5-VL's processor: it gets no pictures with their prompts."""

    def __init__(self) -> None:
        self.tokenizer = tokenizer(2048)

    def __call__(self, text: list[str], images: None, videos: None, **options: Any) -> Any:
        # The real template is longer than the tokens that are cut off; here its words are few.
        return self.tokenizer([" ".join(["dot"] * 140) + one for one in text], **options)

    def decode(self, tokens: Any) -> str:
        return self.tokenizer.decode(tokens)


_SIZES: dict[str, Any] = {
    "in_visual_dim": 4,
    "in_text_dim": WIDTH,
    "in_text_dim2": 8,
    "time_dim": 16,
    "out_visual_dim": 4,
    "model_dim": 32,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 1,
    "axes_dims": (4, 6, 6),
}


def _parts(transformer: Any) -> dict[str, Any]:
    torch.nn.Module.eval(transformer)
    return {
        "transformer": transformer,
        "vae": autoencoder(),
        "text_encoder": llama(),
        "tokenizer": Processor(),
        "text_encoder_2": clip_text(),
        "tokenizer_2": tokenizer(77),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    }


def kandinsky_5() -> Any:
    return diffusers.Kandinsky5T2VPipeline(**_parts(diffusers.Kandinsky5Transformer3DModel(**_SIZES)))


def kandinsky_5_image() -> Any:
    transformer = diffusers.Kandinsky5Transformer3DModel(**_SIZES, visual_cond=True)
    return diffusers.Kandinsky5I2VPipeline(**_parts(transformer))


def kandinsky_6() -> Any:
    transformer = diffusers.Kandinsky6Transformer3DModel(
        **_SIZES, visual_cond=True, in_audio_dim=4, out_audio_dim=4, visual_token_type_num_embeddings=2
    )
    return diffusers.Kandinsky6TI2VAPipeline(**_parts(transformer), audio_vae=None, vocoder=None)
