"""SLA: softmax attention over the best blocks, and linear attention, which learned to stand for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F

from ..blocks import block_means, centred, in_blocks, plan_of_blocks
from ..groups import group_product, repeat_heads
from ..layout import VideoLayout
from ..plan import BlockPlan
from ..schedule import DenseSchedule
from .base import Method, PlanMemory, blocks_for_density, check_count, check_fraction, check_undecided, is_number

LinearScope = Literal["all", "non_critical", "marginal", "none"]
FeatureMap = Literal["softmax", "elu", "relu"]
LINEAR_SCOPES: tuple[LinearScope, ...] = ("all", "non_critical", "marginal", "none")
FEATURE_MAPS: tuple[FeatureMap, ...] = ("softmax", "elu", "relu")
PUBLISHED_EPS = 1e-5
NUMBERS = 2**26  # of a table of the linear branch held at once, over all heads: a quarter of a GiB


Projection = Callable[[torch.Tensor], torch.Tensor]
"""What a layer learned: a linear map of `[..., D]`, such as a `torch.nn.Linear`."""


@dataclass(frozen=True, kw_only=True)
class SLA(Method):
    """Sparse-linear attention (arXiv 2509.24006), which a model must be fine-tuned for (the recipe `sla`).

    Queries and keys are cut into blocks in the order of the sequence. Each query block reads, by softmax attention, the
    key blocks whose mean scores highest with its own; the mean of all keys is taken from the keys first. To the result
    is added `proj(phi(q) S / (phi(q) . z + eps))`, linear attention over the keys of `linear_scope`: S is the sum of
    `phi(k) v^T` and z that of `phi(k)`. `proj`, a linear layer with bias, is one for all heads of a layer, and is
    learned from a start at zero. The choice of blocks has no gradient. Text tokens stay outside: they read and are read
    by everything, and take no part in the linear attention.

    Args:
        topk: share of the key blocks that each query block reads, in (0, 1]: `int(topk * blocks)` of them as published,
            and at least one.
        block: tokens of a query block and of a key block.
        linear_scope: the keys of the linear attention. "all", as in the published code today; "non_critical", all but
            those that the query block reads, as in its first version; "marginal", of these all but the `skip` lowest,
            as in section 4 of the paper; "none", for block-sparse attention alone, which has no weights.
        feature_map: phi: the softmax over the channels, elu + 1, or relu.
        skip: with "marginal", share of the key blocks that are of no use to a query block, the lowest; in [0, 1).
        eps: added to the denominators of the linear attention; None as published, which is 1e-5 for "all" and 0
            otherwise. A query whose denominator is 0 gets nothing from the linear attention, where published code has
            NaN.
        schedule: dense steps and layers; none as published. Dense calls have no linear attention.

    Raises:
        ValueError: a value out of its bounds, or `skip` without "marginal".
    """

    name: ClassVar[str] = "sla"
    summary: ClassVar[str] = "few blocks by softmax, and learned linear attention for the rest"
    good_for: ClassVar[str] = "models fine-tuned for it, with far fewer pairs than is possible without training"
    costs: ClassVar[str] = "needs weights that were trained for its settings"
    source: ClassVar[str] = "arXiv 2509.24006"

    topk: float = 0.1
    block: tuple[int, int] = (64, 64)
    linear_scope: LinearScope = "all"
    feature_map: FeatureMap = "softmax"
    skip: float | None = None
    eps: float | None = None
    schedule: DenseSchedule = field(default_factory=DenseSchedule)

    def __post_init__(self) -> None:
        check_fraction("SLA", "topk", self.topk, fix="0.1 reads a tenth of the key blocks")
        if not isinstance(self.block, tuple) or len(self.block) != 2:
            raise ValueError(f"SLA block is {self.block!r}: it is (queries, keys), such as (64, 64).")
        for name, size in zip(("block[0]", "block[1]"), self.block, strict=True):
            check_count("SLA", name, size, 1)
        for name, known in (("linear_scope", LINEAR_SCOPES), ("feature_map", FEATURE_MAPS)):
            if getattr(self, name) not in known:
                raise ValueError(f"SLA {name} is {getattr(self, name)!r}: choose {', '.join(known)}.")
        if self.linear_scope == "marginal" and self.skip is None:
            object.__setattr__(self, "skip", 0.1)
        if self.skip is not None and self.linear_scope != "marginal":
            raise ValueError(f'SLA skip is {self.skip}, of use only with linear_scope "marginal": leave it out.')
        for name, below in (("skip", 1.0), ("eps", math.inf)):
            value = getattr(self, name)
            if value is not None and (not is_number(value) or not 0 <= value < below):
                raise ValueError(
                    f"SLA {name} is {value!r}: it must be at least 0{' and below 1' if below == 1 else ' and finite'}."
                )

    @classmethod
    def for_density(cls, layout: VideoLayout, density: float, **settings: Any) -> SLA:
        """A config whose `topk` reads `density` of all pairs by softmax, text included.

        Raises:
            ValueError: a density out of range, or a `topk` beside it. OutOfReach: one below what text and one key block
                a query block cost.
        """
        check_undecided("SLA", density, settings, "topk")
        method = cls(**{**settings, "topk": 1.0})
        blocks = method.key_blocks(layout.video_tokens)

        def reading(count: int) -> SLA:
            return replace(method, topk=(count + 0.5) / blocks if count < blocks else 1.0)

        one = f"one key block of {method.block[1]} tokens for each query block"
        return blocks_for_density("SLA", density, layout, blocks, reading, one, "smaller blocks")

    # -- what it comes to ----------------------------------------------------------------------------------------------

    def key_blocks(self, video_tokens: int) -> int:
        """Key blocks of so many video tokens."""
        return -(-video_tokens // self.block[1])

    def blocks_read(self, video_tokens: int) -> int:
        """Key blocks of so many video tokens that each query block reads."""
        return max(1, int(self.topk * self.key_blocks(video_tokens)))

    @property
    def needs_weights(self) -> bool:
        return self.linear_scope != "none"

    @property
    def added_eps(self) -> float:
        """`eps`, or that of the published code."""
        return (PUBLISHED_EPS if self.linear_scope == "all" else 0.0) if self.eps is None else self.eps

    def expected_density(self, layout: VideoLayout) -> float:
        # A last block that is not full is as likely to be read as any other.
        video = layout.video_tokens**2
        share = self.blocks_read(layout.video_tokens) / self.key_blocks(layout.video_tokens)
        return (layout.tokens**2 - video + share * video) / layout.tokens**2

    def remark(self, layout: VideoLayout) -> str:
        blocks = self.key_blocks(layout.video_tokens)
        if int(self.topk * blocks):
            return ""
        return f"SLA topk {self.topk:g} of {blocks} key blocks is less than one: each query block reads one"

    # -- the maths -----------------------------------------------------------------------------------------------------

    def plan(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VideoLayout, memory: PlanMemory
    ) -> BlockPlan:
        selected, linear = self.block_masks(q[:, :, layout.video], k[:, :, layout.video])
        plan = plan_of_blocks(selected, self.block, layout, self.blocks_read(layout.video_tokens))
        return replace(plan, linear=linear)

    def block_masks(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The key blocks that each query block reads by softmax, and by linear attention where those are not all.

        Args:
            q: `[B, H, Nq, D]`. k: `[B, Hkv, Nk, D]`.

        Returns:
            Two of `[B, H, ceil(Nq / block_q), ceil(Nk / block_k)]` bool; None for the second with "all" and "none".
        """
        k_means = repeat_heads(block_means(centred(k), self.block[1]), q.shape[1])
        scores = block_means(q, self.block[0]) @ k_means.transpose(-1, -2)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        blocks, read = scores.shape[-1], self.blocks_read(k.shape[2])
        none = torch.zeros_like(scores, dtype=torch.bool)
        selected = none.scatter(-1, order[..., :read], True)
        if self.linear_scope in ("all", "none"):
            return selected, None
        skipped = min(int((self.skip or 0.0) * blocks), blocks - read)
        return selected, ~selected & ~none.scatter(-1, order[..., blocks - skipped :], True)

    def complete(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: BlockPlan | None,
        layout: VideoLayout,
        weights: Projection | None,
    ) -> torch.Tensor:
        if not self.needs_weights or plan is None:
            return out
        if weights is None:
            raise ValueError(
                f'SLA with linear_scope "{self.linear_scope}" needs the projection that was trained for the layer: '
                'give a model of the recipe sla, or use linear_scope "none".'
            )
        video = layout.video
        linear = self.linear_attention(q[:, :, video], k[:, :, video], v[:, :, video], plan.linear)
        learned = weights(linear).to(out.dtype)
        if not layout.text_tokens:
            return out + learned
        return torch.cat([out[:, :, : video.start], out[:, :, video] + learned, out[:, :, video.stop :]], 2)

    def linear_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: torch.Tensor | None
    ) -> torch.Tensor:
        """The linear attention before its projection, `[B, H, Nq, D]` in float32 or better.

        Args:
            q: `[B, H, Nq, D]`. k, v: `[B, Hkv, Nk, D]`.
            chosen: the key blocks of each query block, `[1|B, 1|H, T, C]` bool; None for all keys.
        """
        batch, heads, tokens, dim = q.shape
        rows = -(-tokens // self.block[0]) if chosen is not None else 1
        kept = heads // k.shape[1] * max(tokens * dim, rows * dim * (dim + 1)) + self.key_blocks(k.shape[2]) * dim * dim
        at_once = max(1, NUMBERS // (batch * kept))  # heads of k and v, whose tables are large
        outputs = []
        for start in range(0, k.shape[1], at_once):
            own = slice(start, start + at_once)
            group = slice(start * heads // k.shape[1], (start + at_once) * heads // k.shape[1])
            some = None if chosen is None else chosen.expand(batch, heads, -1, -1)[:, group]
            outputs.append(self._linear(q[:, group], k[:, own], v[:, own], some))
        return torch.cat(outputs, 1)

    def _linear(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: torch.Tensor | None) -> torch.Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k, v = self._features(q.to(wide)), self._features(k.to(wide)), v.to(wide)
        # A column of ones: the denominators are summed with the numerators.
        v = F.pad(v, (0, 1), value=1.0)
        if chosen is None:
            sums = group_product(q, k.transpose(-1, -2) @ v)
        else:
            queries, block_q = q.shape[2], self.block[0]
            tables = (in_blocks(k, self.block[1]).transpose(-1, -2) @ in_blocks(v, self.block[1])).flatten(-2)
            tables = group_product(chosen.to(wide), tables).unflatten(-1, (k.shape[-1], v.shape[-1]))
            sums = (in_blocks(q, block_q) @ tables).flatten(2, 3)[:, :, :queries]
        total = sums[..., -1:] + self.added_eps
        return torch.where(total > 0, sums[..., :-1] / total.masked_fill(total <= 0, 1.0), 0.0)

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        if self.feature_map == "softmax":
            return x.softmax(-1)
        return F.elu(x) + 1 if self.feature_map == "elu" else F.relu(x)
