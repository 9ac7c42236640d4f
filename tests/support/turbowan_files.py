"""Checkpoints as TurboDiffusion, sglang, FastVideo and LightX2V have them: tiny ones, and the shapes of real ones.

Written from what the published files hold, by other means than the package's tables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

LAYOUTS = ("original", "LightX2V", "sglang", "FastVideo")
_SWAPS = {  # of diffusers' names, in this order
    "original": [
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("proj_out", "head.head"),
        (r"(blocks\.\d+)\.scale_shift_table", r"\1.modulation"),
        (r"^scale_shift_table", "head.modulation"),
        (r"\.norm2\.", ".norm3."),
        (r"ffn\.net\.0\.proj", "ffn.0"),
        (r"ffn\.net\.2", "ffn.2"),
        (r"to_out\.0", "to_o"),
        ("attn1", "self_attn"),
        ("attn2", "cross_attn"),
        (r"\.to_([qkvo])\.", r".\1."),
    ],
    "FastVideo": [
        (r"text_embedder\.linear_1", "text_embedder.fc_in"),
        (r"text_embedder\.linear_2", "text_embedder.fc_out"),
        (r"time_embedder\.linear_1", "time_embedder.mlp.fc_in"),
        (r"time_embedder\.linear_2", "time_embedder.mlp.fc_out"),
        (r"condition_embedder\.time_proj", "condition_embedder.time_modulation.linear"),
        (r"\.norm2\.", ".self_attn_residual_norm.norm."),
        (r"ffn\.net\.0\.proj", "ffn.fc_in"),
        (r"ffn\.net\.2", "ffn.fc_out"),
        (r"to_out\.0", "to_out"),
        (r"(blocks\.\d+)\.attn1\.(?!proj_l)", r"\1."),
    ],
}
_PROJECTION = {
    "original": ("self_attn.proj_l", "self_attn.attn_op.local_attn.proj_l"),
    "LightX2V": ("self_attn.proj_l", "self_attn.proj_l"),
    "sglang": ("attn1.proj_l", "attn1.attn_op.local_attn.proj_l"),
    "FastVideo": ("attn1.proj_l", "attn1.attn_impl.proj_l"),
}


def own_weights(transformer: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of a diffusers transformer by our names, with projections of random numbers."""
    state = dict(transformer.state_dict())
    head = transformer.config.attention_head_dim
    for block in range(transformer.config.num_layers):
        state[f"blocks.{block}.attn1.proj_l.weight"] = torch.randn(head, head)
        state[f"blocks.{block}.attn1.proj_l.bias"] = torch.randn(head)
    return state


def in_layout(state: Mapping[str, torch.Tensor], layout: str = "original") -> dict[str, torch.Tensor]:
    """Our names and shapes to those of a layout."""
    naming = "original" if layout == "LightX2V" else layout
    made = {}
    for name, value in state.items():
        for old, new in _SWAPS.get(naming, ()):
            name = re.sub(old, new, name)
        name = name.replace(*_PROJECTION[layout])
        if naming == "original" and name == "patch_embedding.weight":
            value = value.flatten(1)
        made[name] = value
    return made


def quantised(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The 8-bit form of a checkpoint in the original layout, and the weights that it stands for."""
    made, meant = {}, {}
    for name, value in state.items():
        if not re.fullmatch(r"blocks\.\d+\.(self_attn|cross_attn|ffn)\.[qkvo02]\.weight", name):
            made[name] = value
            continue
        rows, columns = ((size + 127) // 128 for size in value.shape)
        scale, bits, back = torch.zeros(rows, columns), torch.zeros_like(value, dtype=torch.int8), value.clone()
        for row in range(rows):
            for column in range(columns):
                part = (slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
                scale[row, column] = value[part].abs().max() / 127
                bits[part] = (value[part] / scale[row, column]).round().to(torch.int8)
                back[part] = bits[part].float() * scale[row, column]
        stem = name.removesuffix("weight")
        made |= {f"{stem}int8_weight": bits, f"{stem}scale": scale}
        meant[name] = back
    return made, {**state, **meant}


class _Attention(nn.Module):
    def __init__(self, dim: int, head: int | None = None) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = (nn.LayerNorm(dim, bias=False) for _ in range(2))
        if head is not None:
            self.attn_op = nn.Module()
            self.attn_op.local_attn = nn.Module()
            self.attn_op.local_attn.proj_l = nn.Linear(head, head)


class _Block(nn.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))
        self.self_attn, self.norm3, self.cross_attn = _Attention(dim, 128), nn.LayerNorm(dim), _Attention(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim))


class _Model(nn.Module):
    """The parameters of a published model, as its own code lays them out."""

    def __init__(self, dim: int, inner: int, depth: int, channels: int) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(4 * channels, dim)
        self.text_embedding = nn.Sequential(nn.Linear(4096, dim), nn.GELU(), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(_Block(dim, inner) for _ in range(depth))
        self.head = nn.Module()
        self.head.head = nn.Linear(dim, 64)
        self.head.modulation = nn.Parameter(torch.empty(1, 2, dim))


SIZES: dict[str, Any] = {
    "TurboWan2.1-T2V-1.3B-480P": (1536, 8960, 30, 16),
    "TurboWan2.1-T2V-14B-720P": (5120, 13824, 40, 16),
    "TurboWan2.2-I2V-A14B-high-720P": (5120, 13824, 40, 36),
}


def published_shapes(name: str, eight_bits: bool = False) -> dict[str, torch.Tensor]:
    """Every key of a published file, with a tensor of its shape and type that takes no memory."""
    with torch.device("meta"):
        state = _Model(*SIZES[name]).state_dict()
    made = {}
    for key, value in state.items():
        if eight_bits and re.fullmatch(r"blocks\..*\.[qkvo02]\.weight", key):
            stem, blocks = key.removesuffix("weight"), [(size + 127) // 128 for size in value.shape]
            made[f"{stem}int8_weight"] = torch.zeros(1, dtype=torch.int8).expand(value.shape)
            made[f"{stem}scale"] = torch.zeros(1).expand(blocks)
            continue
        dtype = torch.float32 if "proj_l" in key else torch.bfloat16
        made[key] = torch.zeros(1, dtype=dtype).expand(value.shape)
    return made
