"""The self-attention processor of Wan transformers with the sparse call in it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

from ...attention import SparseAttention
from ...attention.engine import engine_attention
from .copies import CopiedNotPickled
from .diffusers_hooks import scores_are_skipped


class SparseWanAttnProcessor(CopiedNotPickled):
    """Replaces `WanAttnProcessor` in self-attention layers.

    Projections, norms and rotary embedding are those of the stock processor in the same order, so a layer that stays
    dense gives the stock output bit for bit.

    Args:
        engine: decides and computes.
        layer: transformer block, counted from 0.
        replaced: the processor that was there; its attention backend is kept for dense calls.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, engine: SparseAttention, layer: int, replaced: object) -> None:
        self.engine = engine
        self.layer = layer
        self._attention_backend = getattr(replaced, "_attention_backend", None)
        self._bind()

    def _bind(self) -> None:
        """Make this processor the one whose dense attention the engine uses in this layer."""
        self.site = torch.tensor([self.engine.id, self.layer])
        self.engine.bind_dense(self.layer, self._dense)

    def __setstate__(self, state: dict) -> None:
        # A copy has a copy of the engine, with an id of its own.
        super().__setstate__(state)
        self._bind()

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Self-attention of one block: `hidden_states [B, N, C] -> [B, N, C]`.

        Raises:
            RuntimeError: context parallelism was switched on, which shards the sequence that a plan describes whole.
        """
        if self._parallel_config is not None:
            raise RuntimeError(
                "sparse attention plans the whole sequence and cannot run under context parallelism: remove the handle "
                "before enable_parallelism, or run on one device."
            )
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        if rotary_emb is not None:
            query, key = (_rotate(x, *rotary_emb) for x in (query, key))

        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if torch.compiler.is_compiling():
            out = engine_attention(query, key, value, self.site)
        else:
            dense = "perturbed attention" if scores_are_skipped() else ""
            out = self.engine(query, key, value, self.layer, dense=dense)
        out = out.transpose(1, 2).flatten(2, 3).type_as(query)
        for module in attn.to_out:
            out = module(out)
        return out

    def _dense(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Dense attention through the backend that the user chose in diffusers, `[B, H, N, D]`."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return dispatch_attention_fn(q, k, v, backend=self._attention_backend).transpose(1, 2)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of `x [B, N, H, D]` by tables `[1, N, 1, D]` in which each angle stands twice in a row."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 0::2]
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).type_as(x)
