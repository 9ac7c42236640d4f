"""What the parameters of a Wan model of text to video are called: by diffusers, and in files of others."""

from __future__ import annotations

import re

# diffusers: (Wan's original, FastVideo's), first outside the blocks, then in a block.
_OUTSIDE = {
    "patch_embedding": ("patch_embedding", "patch_embedding"),
    "condition_embedder.text_embedder.linear_1": ("text_embedding.0", "condition_embedder.text_embedder.fc_in"),
    "condition_embedder.text_embedder.linear_2": ("text_embedding.2", "condition_embedder.text_embedder.fc_out"),
    "condition_embedder.time_embedder.linear_1": ("time_embedding.0", "condition_embedder.time_embedder.mlp.fc_in"),
    "condition_embedder.time_embedder.linear_2": ("time_embedding.2", "condition_embedder.time_embedder.mlp.fc_out"),
    "condition_embedder.time_proj": ("time_projection.1", "condition_embedder.time_modulation.linear"),
    "scale_shift_table": ("head.modulation", "scale_shift_table"),
    "proj_out": ("head.head", "proj_out"),
}
_IN_BLOCK = {
    "scale_shift_table": ("modulation", "scale_shift_table"),
    "attn1.to_q": ("self_attn.q", "to_q"),
    "attn1.to_k": ("self_attn.k", "to_k"),
    "attn1.to_v": ("self_attn.v", "to_v"),
    "attn1.to_out.0": ("self_attn.o", "to_out"),
    "attn1.norm_q": ("self_attn.norm_q", "norm_q"),
    "attn1.norm_k": ("self_attn.norm_k", "norm_k"),
    "attn2.to_q": ("cross_attn.q", "attn2.to_q"),
    "attn2.to_k": ("cross_attn.k", "attn2.to_k"),
    "attn2.to_v": ("cross_attn.v", "attn2.to_v"),
    "attn2.to_out.0": ("cross_attn.o", "attn2.to_out"),
    "attn2.norm_q": ("cross_attn.norm_q", "attn2.norm_q"),
    "attn2.norm_k": ("cross_attn.norm_k", "attn2.norm_k"),
    "norm2": ("norm3", "self_attn_residual_norm.norm"),
    "ffn.net.0.proj": ("ffn.0", "ffn.fc_in"),
    "ffn.net.2": ("ffn.2", "ffn.fc_out"),
}
NAMINGS = ("original", "FastVideo", "diffusers")

BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_KIND = re.compile(r"(.+?)(\.weight|\.bias|)")


def renamed(own: str, naming: str) -> str:
    """What a parameter of `WanTransformer3DModel` is called in one of `NAMINGS`; ComfyUI has the original names.

    Raises:
        KeyError: text to video has no such parameter.
    """
    if naming == "diffusers":
        return own
    block = BLOCK.fullmatch(own)
    kind = _KIND.fullmatch(block[2] if block else own)
    assert kind is not None
    theirs = (_OUTSIDE if block is None else _IN_BLOCK)[kind[1]][NAMINGS.index(naming)]
    return f"{'' if block is None else f'blocks.{block[1]}.'}{theirs}{kind[2]}"
