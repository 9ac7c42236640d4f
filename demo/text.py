"""Text conditioning in training, equal to what `WanPipeline` computes but cheaper.

The pipeline pads the states of a prompt with zeros to 512 positions and lets the video attend to all of them. The
padded positions are all the same after the text embedder, so attention over n of them equals attention over one whose
logit is raised by log(n).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import WanTransformer3DModel
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

SEQUENCE_LENGTH = 512
"""Positions that `WanPipeline` pads prompts to (`max_sequence_length`)."""


def encode_text(
    encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], length: int
) -> torch.Tensor:
    """States `[B, length + 1, D]` of prompts, zero after the end mark; the last one stands for all further padding.

    Raises:
        ValueError: when a prompt has more than `length` tokens.
    """
    tokens = tokenizer(prompts, padding="max_length", max_length=length + 1, truncation=False, return_tensors="pt")
    mask = tokens.attention_mask.to(encoder.device)
    if mask.shape[1] > length + 1 or bool(mask[:, length].any()):
        raise ValueError(f"a prompt has {int(mask.sum(1).max())} tokens, the limit is {length}: raise `length`")
    states = encoder(tokens.input_ids.to(encoder.device), mask).last_hidden_state
    return states * mask[..., None]


class PaddedCrossAttnProcessor:
    """Cross-attention in which the last key stands for `SEQUENCE_LENGTH - (keys - 1)` equal ones.

    The maths is that of `WanAttnProcessor` for text; it is for training only, and only where the text ends in padding.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        import torch.nn.functional as functional

        query = attn.norm_q(attn.to_q(hidden_states))
        key = attn.norm_k(attn.to_k(encoder_hidden_states))
        value = attn.to_v(encoder_hidden_states)
        query, key, value = (t.unflatten(2, (attn.heads, -1)).transpose(1, 2) for t in (query, key, value))
        keys = key.shape[2]
        bias = query.new_zeros(1, 1, 1, keys)
        bias[..., -1] = math.log(SEQUENCE_LENGTH - (keys - 1))
        out = functional.scaled_dot_product_attention(query, key, value.type_as(query), attn_mask=bias)
        out = out.transpose(1, 2).flatten(2).type_as(query)
        return attn.to_out[1](attn.to_out[0](out))


def use_padded_cross_attention(transformer: WanTransformer3DModel) -> None:
    """Put `PaddedCrossAttnProcessor` on every cross-attention of the transformer."""
    for block in transformer.blocks:
        block.attn2.set_processor(PaddedCrossAttnProcessor())


def ignore_padding_at_first(transformer: WanTransformer3DModel) -> None:
    """Initialise cross-attention so that the some 500 padded positions do not drown the ten words.

    At the usual initialisation all positions get about the same weight, so the words get 2 % together. Here queries
    lean to the vector of ones, keys of padding to its negative, and keys of words to it: words have a nearly constant
    component after the GELU of the text embedder, padding has none as the biases there start at zero. Training may
    undo all of it.
    """
    import torch

    embedder = transformer.condition_embedder.text_embedder
    with torch.no_grad():
        embedder.linear_1.bias.zero_()
        embedder.linear_2.bias.zero_()
        width = embedder.linear_2.weight.shape[1]
        embedder.linear_2.weight += 4.0 / width
        for block in transformer.blocks:
            block.attn2.to_q.bias.fill_(1.0)
            block.attn2.to_k.bias.fill_(-1.0)
            block.attn2.to_k.weight += 4.0 / block.attn2.to_k.weight.shape[1]
