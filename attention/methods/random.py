"""The control: blocks at random. A method that does not beat it at equal density knows nothing about the video."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ..layout import VideoLayout
from ..plan import BlockPlan
from ..schedule import DenseSchedule
from .base import Method, OutOfReach, PlanMemory, check_count, check_flag, check_fraction, check_seed


@dataclass(frozen=True, kw_only=True)
class RandomBlocks(Method):
    """Uniform blocks kept at random, as many in each row of blocks, drawn for each head and layer.

    Redrawn at each step, its errors differ from step to step and partly cancel over a run, which no fixed mask can do:
    that is the control of methods that plan anew at each step. `redraw=False` is the control of fixed masks.

    Args:
        density: share of the key blocks each query block reads, in (0, 1], rounded to whole blocks.
        block_size: tokens per block.
        redraw: new blocks at every step; else those of a layer's first call in a run stay, the same for a whole batch.
        seed: of the generator, which starts anew with each run.
    """

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "blocks kept at random, as a control"
    good_for: ClassVar[str] = "knowing what a density is worth without a method"
    costs: ClassVar[str] = "quality"
    source: ClassVar[str] = "-"

    density: float = 0.3
    block_size: int = 16
    redraw: bool = True
    seed: int = 0
    schedule: DenseSchedule = field(default_factory=lambda: DenseSchedule(first_steps=0.2))

    def __post_init__(self) -> None:
        check_fraction("RandomBlocks", "density", self.density, fix="0.3 keeps 30 % of the pairs")
        check_count("RandomBlocks", "block_size", self.block_size, 1)
        check_flag("RandomBlocks", "redraw", self.redraw)
        check_seed("RandomBlocks", self.seed)

    def check(self, layout: VideoLayout) -> None:
        blocks = self._blocks(layout.tokens)
        if self.density < 0.5 / blocks:
            raise OutOfReach(
                f"RandomBlocks density {self.density:g} is below {1 / blocks:.3f}, which is one block of "
                f"{self.block_size} tokens for each query: raise it, or use smaller blocks.",
                "density",
                self.density,
                least=1 / blocks,
                eased_by=("block_size",),
            )

    def expected_density(self, layout: VideoLayout) -> float:
        blocks = self._blocks(layout.tokens)
        return self._kept(blocks) / blocks

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _kept(self, blocks: int) -> int:
        """Of so many blocks, those that each query block reads."""
        return max(1, round(self.density * blocks))

    def plan(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VideoLayout, memory: PlanMemory
    ) -> BlockPlan:
        if "random" in memory.drawn:
            return memory.drawn["random"]
        if "generator" not in memory.run:
            seed = self.seed + (memory.turn if self.redraw else 0)
            memory.run["generator"] = torch.Generator("cpu").manual_seed(seed)
        batch, heads, length = q.shape[:3]
        batch = batch if self.redraw else 1
        blocks = self._blocks(length)
        kept = self._kept(blocks)
        mask = torch.zeros(batch, memory.heads.total(heads), blocks, blocks, dtype=torch.bool, device="cpu")
        for of_head in mask.flatten(0, 1):  # scores of all heads at once would be gigabytes in a long video
            scores = torch.rand(of_head.shape, generator=memory.run["generator"], device="cpu")
            of_head.scatter_(-1, scores.topk(kept, dim=-1).indices, True)
        mask = memory.heads.mine(mask)
        plan = BlockPlan.from_block_mask(mask, self.block_size, self.block_size, length, length).to(q.device)
        if not self.redraw:
            memory.drawn["random"] = plan
        return plan
