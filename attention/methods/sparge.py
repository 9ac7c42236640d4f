"""SpargeAttn: blocks of tokens stand for themselves by their means, where they are alike enough."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ..blocks import block_means, centred, plan_of_blocks
from ..groups import repeat_heads
from ..layout import VideoLayout
from ..plan import BlockPlan
from ..running_sum import running_sum
from ..schedule import DenseSchedule
from .base import (
    Method,
    OutOfReach,
    PlanMemory,
    blocks_for_density,
    check_count,
    check_flag,
    check_fraction,
    check_undecided,
    is_number,
)


@dataclass(frozen=True, kw_only=True)
class Sparge(Method):
    """SpargeAttn (arXiv 2502.18137, sections 3.2 to 3.4), for any number of tokens.

    Queries and keys are cut into blocks in the order of the sequence, and a block is its mean token; from the keys the
    mean of all keys is taken first, as SageAttention does. The softmax over the scores of the means says how much of
    its attention a query block has for each key block, and the best blocks are read. A mean says nothing of a block
    whose tokens differ: with a threshold, blocks of low *self-similarity* (mean cosine of all pairs of their tokens)
    are never left out, as queries or as keys. Text tokens stay outside: they read and are read by everything.

    The second stage is off unless `pv_threshold` is given: a tile of keys is then left out within the softmax, once its
    scores are known and all lie that far below the largest so far of each query. The paper decides so for each warp and
    leaves the weights of such a tile in the sum that the output is divided by; here all queries of a program decide
    together, and the tile counts as if it were not read.

    Args:
        topk: share of the key blocks that each query block reads, in (0, 1]; the default, with 0.5, as published.
        cdf: instead of `topk`: the best blocks are read until their share of the softmax would pass this, in (0, 1].
            The block that crosses is *not* read (in SVG2 it is).
        similarity: threshold of the self-similarity, -1 to 1; below 0 the test is off, as published.
        block: tokens of a query block and of a key block.
        sink: every query block reads the first key block.
        pv_threshold: of the second stage, above 0: the difference of scaled scores from which on a tile is left out.
            Each of its keys has less than `exp(-pv_threshold)` of the weight of the best. Needs the backend `triton`.
        published: repeat the published code in a last block that is not full: it is never similar, so a last query
            block reads everything and a last key block is read by all.
        schedule: dense steps and layers; none as published.

    Raises:
        ValueError: `topk` and `cdf` together or neither, or a value out of its bounds.
    """

    name: ClassVar[str] = "sparge"
    summary: ClassVar[str] = "blocks chosen by the softmax over their mean tokens"
    good_for: ClassVar[str] = "any model and size, training-free, with a plan for each call at little cost"
    costs: ClassVar[str] = "blocks follow the order of tokens and not their content"
    source: ClassVar[str] = "arXiv 2502.18137"

    topk: float | None = None
    cdf: float | None = None
    similarity: float = -0.1
    block: tuple[int, int] = (128, 64)
    sink: bool = False
    pv_threshold: float | None = None
    published: bool = False
    schedule: DenseSchedule = field(default_factory=DenseSchedule)

    def __post_init__(self) -> None:
        if self.topk is None and self.cdf is None:
            object.__setattr__(self, "topk", 0.5)
        if self.topk is not None and self.cdf is not None:
            raise ValueError(f"Sparge has topk {self.topk} and cdf {self.cdf}: give one of them.")
        if self.topk is not None:
            check_fraction("Sparge", "topk", self.topk, fix="0.5 reads half of the key blocks")
        if self.cdf is not None:
            check_fraction("Sparge", "cdf", self.cdf, fix="0.97 keeps 97 % of the estimated mass")
        if not is_number(self.similarity) or not -1 <= self.similarity <= 1:
            raise ValueError(
                f"Sparge similarity is {self.similarity!r}: it is a mean cosine, from -1 to 1; below 0 it is off."
            )
        bound = self.pv_threshold
        if bound is not None and (not is_number(bound) or bound <= 0):
            raise ValueError(
                f"Sparge pv_threshold is {bound!r}: it must be above 0, such as 10, which leaves out weights below "
                "exp(-10) of the largest; None leaves out nothing."
            )
        for name in ("sink", "published"):
            check_flag("Sparge", name, getattr(self, name))
        if not isinstance(self.block, tuple) or len(self.block) != 2:
            raise ValueError(f"Sparge block is {self.block!r}: it is (queries, keys), such as (128, 64).")
        for name, size in zip(("block[0]", "block[1]"), self.block, strict=True):
            check_count("Sparge", name, size, 1)

    @classmethod
    def for_density(cls, layout: VideoLayout, density: float, **settings: Any) -> Sparge:
        """A config whose `topk` computes `density` of all pairs, text included.

        What `sink` and `published` add is in it, to a key block for each query block: the sink may be among the best.

        Raises:
            ValueError: a density out of range, or a `topk` or `cdf` beside it. OutOfReach: one below what text and one
                key block a query block cost; a similarity that is not off, with which the density depends on the
                content.
        """
        check_undecided("Sparge", density, settings, "topk", "cdf")
        method = cls(**{**settings, "topk": 1.0})
        if method.similarity >= 0:
            raise OutOfReach(
                f"Sparge similarity is {method.similarity}: which blocks are read in full then depends on the content, "
                f"and no topk gives a density of {density}. Leave similarity below 0, or give topk.",
                "similarity",
                method.similarity,
                most=0.0,
            )
        blocks = method._blocks(layout)
        tails = any(layout.video_tokens % size for size in method.block) and method.published
        one = f"one key block of {method.block[1]} tokens for each query block"
        one += f"{', the sink' if method.sink else ''}{', the last blocks' if tails else ''}"

        def reading(count: int) -> Sparge:
            return replace(method, topk=min(1.0, (count + 0.5) / blocks))  # between two counts, whatever the rounding

        return blocks_for_density("Sparge", density, layout, blocks, reading, one, "smaller blocks")

    def expected_density(self, layout: VideoLayout) -> float | None:
        """None where the content decides how many blocks are read. The sink is one of the best as often as any other,
        and so is a last block that is not full.
        """
        if self.uneven_heads:
            return None
        tokens, blocks = layout.video_tokens, self._blocks(layout)
        tails = [tokens % size / tokens * self.published for size in self.block]
        kept = self._kept(blocks)
        read = kept + self.sink * (1 - kept / blocks)
        share = min(1.0, read * self.block[1] / tokens + tails[1]) if tails[1] else read / blocks
        return 1 - (tokens / layout.tokens) ** 2 * (1 - tails[0]) * (1 - share)

    @property
    def second_stage(self) -> bool:
        return self.pv_threshold is not None

    @property
    def uneven_heads(self) -> bool:
        return self.cdf is not None or self.similarity >= 0

    def plan(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VideoLayout, memory: PlanMemory
    ) -> BlockPlan:
        video_q, video_k = q[:, :, layout.video], k[:, :, layout.video]
        mask = self.block_mask(video_q, video_k)
        read = None if self.uneven_heads or self.published else self._kept(mask.shape[-1]) + self.sink
        plan = plan_of_blocks(mask, self.block, layout, read)
        return replace(plan, pv_threshold=self.pv_threshold)

    def block_mask(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The key blocks that each query block reads, `[B, H, ceil(Nq / block_q), ceil(Nk / block_k)]` bool.

        Args:
            q: `[B, H, Nq, D]`. k: `[B, Hkv, Nk, D]`.
        """
        k = centred(k)
        block_q, block_k = self.block
        q_mean, q_alike = self._means(q, block_q)
        k_mean, k_alike = (repeat_heads(x, q.shape[1]) for x in self._means(k, block_k))
        scores = (q_mean @ k_mean.transpose(-1, -2)) * q.shape[-1] ** -0.5
        # A block without any block that is alike has no ranking: NaN, and it reads all that are not alike.
        weights = scores.masked_fill(~k_alike.unsqueeze(-2), -torch.inf).softmax(-1).nan_to_num(0.0)
        ordered, ranking = weights.sort(dim=-1, descending=True, stable=True)
        if self.cdf is not None:
            # A sum of all weights may round to just above 1.
            keep = (running_sum(ordered) <= self.cdf) | (self.cdf == 1.0)
        else:
            keep = torch.zeros_like(ordered, dtype=torch.bool)
            keep[..., : self._kept(ordered.shape[-1])] = True
        keep[..., 0] = True
        selected = torch.zeros_like(keep).scatter_(-1, ranking, keep)
        if self.sink:
            selected[..., 0] = True
        return selected | ~k_alike.unsqueeze(-2) | ~q_alike.unsqueeze(-1)

    def _blocks(self, layout: VideoLayout) -> int:
        """Key blocks of a video."""
        return -(-layout.video_tokens // self.block[1])

    def _kept(self, blocks: int) -> int:
        """The key blocks of highest score that are read, by `topk`: at least one, since no query may read nothing."""
        return max(1, int(self.topk * blocks))

    def _means(self, x: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean token `[B, H, n, D]` of each block, and whether it stands for the block, `[B, H, n]` bool."""
        means = block_means(x, block)
        if self.similarity < 0:
            alike = torch.ones_like(means[..., 0], dtype=torch.bool)
        else:
            # The mean of all cosines is the squared length of the mean direction.
            directions = block_means(F.normalize(x.float(), dim=-1), block)
            alike = directions.square().sum(-1) > self.similarity
        if self.published and x.shape[2] % block:
            alike[..., -1] = False
        return means, alike
