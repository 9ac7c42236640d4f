"""Tokenizers in memory, and text and picture encoders of random weights, at tiny sizes."""

from __future__ import annotations

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["<pad>", "</s>", "<unk>", "<s>", "<|end_header_id|>", "<image>", "<|vision_start|>", "a", "dot", "moves"]
WIDTH = 16
CHAT = "{% for m in messages %}{{ m['content'] if m['content'] is string else m['content'][0]['text'] }} {% endfor %}"


def tokenizer(length: int = 64, before: int = 0) -> transformers.PreTrainedTokenizerFast:
    """Words of `WORDS`, all others unknown; signs apart, so that templates are as long as pipelines expect.

    Args:
        length: the most tokens.
        before: words that the chat template has before what it is given.
    """
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
        model_max_length=length,
    )
    made.chat_template = "dot " * before + CHAT
    return made


def t5(width: int = WIDTH) -> transformers.T5EncoderModel:
    config = transformers.T5Config(vocab_size=len(WORDS), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config).eval()


def umt5() -> transformers.UMT5EncoderModel:
    config = transformers.UMT5Config(
        vocab_size=len(WORDS), d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2, tie_word_embeddings=False
    )
    return transformers.UMT5EncoderModel(config).eval()


_BLOCK = {"hidden_size": WIDTH, "intermediate_size": 16, "num_attention_heads": 2}


def clip_text(width: int = 8) -> transformers.CLIPTextModel:
    config = transformers.CLIPTextConfig(
        **{**_BLOCK, "hidden_size": width},
        vocab_size=len(WORDS),
        num_hidden_layers=1,
        max_position_embeddings=77,
        projection_dim=width,
        eos_token_id=1,
        bos_token_id=3,
        pad_token_id=0,
    )
    return transformers.CLIPTextModel(config).eval()


def clip_vision(width: int = WIDTH) -> transformers.CLIPVisionModel:
    config = transformers.CLIPVisionConfig(
        **{**_BLOCK, "hidden_size": width}, num_hidden_layers=2, image_size=16, patch_size=8
    )
    return transformers.CLIPVisionModel(config).eval()


def clip_pictures(size: int = 16) -> transformers.CLIPImageProcessor:
    return transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def siglip_vision(width: int = WIDTH) -> transformers.SiglipVisionModel:
    config = transformers.SiglipVisionConfig(
        **{**_BLOCK, "hidden_size": width}, num_hidden_layers=1, image_size=32, patch_size=16
    )
    return transformers.SiglipVisionModel(config).eval()


def siglip_pictures() -> transformers.SiglipImageProcessor:
    return transformers.SiglipImageProcessor(size={"height": 32, "width": 32})


def llama() -> transformers.LlamaModel:
    config = transformers.LlamaConfig(**_BLOCK, vocab_size=len(WORDS), num_hidden_layers=3, num_key_value_heads=2)
    return transformers.LlamaModel(config).eval()
