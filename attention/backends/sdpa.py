"""Dense attention through torch's `scaled_dot_product_attention`."""

from __future__ import annotations

import torch

from ..groups import dense_attention
from ..plan import BlockPlan
from .base import ANY_HEAD_DIM, EVERYWHERE, Backend, Capability


class SdpaBackend(Backend):
    """What a dense call costs. Takes only plans that cover every pair; token orders then change nothing."""

    name = "sdpa"
    summary = "torch's dense attention; for the dense steps and layers"
    capability = Capability(
        devices=EVERYWHERE,
        dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
        max_head_dim=ANY_HEAD_DIM,
        lse=(),
        backward=EVERYWHERE,
        sparse=False,
    )

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return dense_attention(q, k, v, scale), None
