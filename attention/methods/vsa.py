"""VSA: cubes of the video chosen by their means, and a gated coarse attention over the means, which was trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ..clustering.clusters import text_last
from ..gradients import wants_gradient
from ..groups import repeat_heads
from ..layout import VideoLayout
from ..plan import BlockPlan
from ..schedule import DenseSchedule
from .base import Method, PlanMemory, blocks_for_density, check_count, check_flag, check_fraction

CUBE = (4, 4, 4)
"""Frames, rows and columns of a cube, as published: the 64 tokens of a block of the kernels."""


@dataclass(frozen=True, kw_only=True)
class VSA(Method):
    """Video Sparse Attention (arXiv 2505.13389), with the gates of a model that was trained for it, such as FastWan.

    The video is cut into cubes of neighbouring tokens in time and space, and each is its mean query, key and value. By
    softmax attention, every query of a cube reads the key cubes whose mean scores highest with its own (the *fine*
    branch). To that is added the *coarse* branch: softmax attention of the means over all cubes, the same for all
    tokens of a cube, times a gate for each token and channel, which a linear layer of the model makes of what the
    attention layer is given. Text tokens stay outside: they read and are read by everything, and have no coarse branch.

    Cubes at the far edges of the video may have fewer tokens; no size has to be padded.

    Args:
        density: share of the key cubes that each query cube reads, in (0, 1]: `ceil(density * cubes)` of them as
            published, where it is 1 - sparsity. FastWan 1.3B and 5B were trained for 0.2, the 14B for 0.1.
        cube: frames, rows and columns of a cube.
        gated: with the coarse branch. False leaves it out, and needs no weights: block-sparse attention, the baseline.
        schedule: dense steps and layers; none as published. Dense calls keep the coarse branch.

    Raises:
        ValueError: a value out of its bounds.
    """

    name: ClassVar[str] = "vsa"
    summary: ClassVar[str] = "cubes chosen by their means, and a trained gate on the attention of the means"
    good_for: ClassVar[str] = "models fine-tuned for it, such as FastWan"
    costs: ClassVar[str] = "needs gates that were trained, and has the density of the training"
    source: ClassVar[str] = "arXiv 2505.13389"

    density: float = 0.2
    cube: tuple[int, int, int] = CUBE
    gated: bool = True
    schedule: DenseSchedule = field(default_factory=DenseSchedule)

    def __post_init__(self) -> None:
        check_fraction("VSA", "density", self.density, fix="0.2 reads a fifth of the key cubes")
        if not isinstance(self.cube, tuple) or len(self.cube) != 3:
            raise ValueError(f"VSA cube is {self.cube!r}: it is (frames, rows, columns), such as {CUBE}.")
        for place, size in enumerate(self.cube):
            check_count("VSA", f"cube[{place}]", size, 1)
        check_flag("VSA", "gated", self.gated)

    @classmethod
    def for_density(cls, layout: VideoLayout, density: float, **settings: Any) -> VSA:
        """A config that computes about `density` of all pairs in the fine branch, text included; mostly less where
        cubes at the edges are not full, see `expected_density`.

        Raises:
            ValueError: a density out of range. OutOfReach: one below what text and one key cube a query cube cost.
        """
        method = cls(**settings)
        cubes = math.prod(method.cubes(layout))
        one = f"one key cube of {math.prod(method.cube)} tokens for each query cube"
        return blocks_for_density(
            "VSA", density, layout, cubes, lambda count: replace(method, density=count / cubes), one, "smaller cubes"
        )

    # -- what it comes to ----------------------------------------------------------------------------------------------

    def cubes(self, layout: VideoLayout) -> tuple[int, int, int]:
        """Cubes along frames, rows and columns."""
        frames, rows, columns = (-(-size // edge) for size, edge in zip(layout.grid, self.cube, strict=True))
        return frames, rows, columns

    def cubes_read(self, layout: VideoLayout) -> int:
        """Key cubes that each query cube reads."""
        count = math.prod(self.cubes(layout))
        # Rounded first: 0.1 of 30 cubes are 3, and not 3.0000000000000004, which would be 4.
        return max(1, min(math.ceil(round(self.density * count, 9)), count))

    @property
    def needs_weights(self) -> bool:
        return self.gated

    @property
    def completes_dense(self) -> bool:
        return self.gated

    def expected_density(self, layout: VideoLayout) -> float:
        """An estimate, mostly too high where cubes at the edges are not full: a mean of fewer tokens is longer, so that
        they are chosen more often. At 0.2 calls of 21x30x52 tokens compute 0.17 to 0.18.
        """
        video = layout.video_tokens**2
        share = self.cubes_read(layout) / math.prod(self.cubes(layout))
        return (layout.tokens**2 - video + share * video) / layout.tokens**2

    # -- the maths -----------------------------------------------------------------------------------------------------

    def plan(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VideoLayout, memory: PlanMemory
    ) -> BlockPlan:
        if (self, layout) not in memory.layout:
            memory.layout[self, layout] = self._sizes(layout, q.device), self._order(layout, q.device)
        sizes, order = memory.layout[self, layout]
        scores = self._scores(q, k, layout)
        # The means again would cost `complete` as much as they cost here; but what is planned records no gradients.
        handed = self.gated and not any(x.requires_grad for x in (q, k, v))
        coarse = self._coarse(scores, v, layout) if handed else None
        best = scores.topk(self.cubes_read(layout), -1).indices
        selected = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
        text = int(layout.text_tokens > 0)
        if text:
            selected = F.pad(selected, (0, text, 0, text), value=True)
        sizes = F.pad(sizes, (0, text), value=layout.text_tokens).expand(*selected.shape[:2], -1)
        # As many runs as there may be: none of the cubes that a tile reads need lie side by side.
        most = min(self.cubes_read(layout) + text, (selected.shape[-1] + 1) // 2)
        plan = BlockPlan.from_clusters(
            sizes,
            sizes,
            selected,
            order,
            order,
            n_q=layout.tokens,
            n_kv=layout.tokens,
            max_runs=None if q.device.type == "cpu" else most,
        )
        return replace(plan, coarse=coarse)

    def complete(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: BlockPlan | None,
        layout: VideoLayout,
        weights: Any,
    ) -> torch.Tensor:
        """Adds the coarse branch.

        Args:
            weights: the gate of each token and channel, `[B, H, N, D]`.
        """
        if not self.gated:
            return out
        if weights is None:
            raise ValueError(
                "VSA needs the gates that were trained for the layer: give a model that was trained for it, or use "
                "gated=False."
            )
        coarse = None if plan is None or wants_gradient(q, k, v) else plan.coarse
        if coarse is None:
            coarse = self._coarse(self._scores(q, k, layout), v, layout)
        coarse = coarse.to(out.dtype)
        if not wants_gradient(out, coarse, weights):
            # What a backend made of a plan is ours to add to; what a model made may be its own, or its values.
            out = out.clone() if plan is None else out
            self._add_in_place(out, coarse, weights, layout)
            return out
        video = layout.video
        added = (coarse[:, :, self._cube_of(layout, q.device)] * weights[:, :, video]).to(out.dtype)
        if not layout.text_tokens:
            return out + added
        return torch.cat([out[:, :, : video.start], out[:, :, video] + added, out[:, :, video.stop :]], 2)

    def _add_in_place(self, out: torch.Tensor, coarse: torch.Tensor, gate: torch.Tensor, layout: VideoLayout) -> None:
        """Add the gated coarse branch to the video in `out`, both `[B, H, N, D]`, one layer of cubes after the other:
        spread over all tokens at once, it would take the memory of the output twice more.

        Args:
            coarse: `[B, H, n, D]`.
        """
        row, column = (
            torch.arange(size, device=out.device) // edge
            for size, edge in zip(layout.grid[1:], self.cube[1:], strict=True)
        )
        out, gate = (x[:, :, layout.video].unflatten(2, layout.grid) for x in (out, gate))  # views
        coarse = coarse.unflatten(2, self.cubes(layout))
        for number, first in enumerate(range(0, layout.frames, self.cube[0])):
            frames = slice(first, first + self.cube[0])
            spread = coarse[:, :, number, row[:, None], column].unsqueeze(2)
            out[:, :, frames] += (spread * gate[:, :, frames]).to(out.dtype)

    def _coarse(self, scores: torch.Tensor, v: torch.Tensor, layout: VideoLayout) -> torch.Tensor:
        """Softmax attention of the means, `[B, H, n, D]` in float32 or better."""
        means = repeat_heads(self._means(v, layout), scores.shape[1])
        return scores.softmax(-1) @ means

    def _scores(self, q: torch.Tensor, k: torch.Tensor, layout: VideoLayout) -> torch.Tensor:
        """The scaled score of each mean query with each mean key, `[B, H, n, n]` float32."""
        q_means, k_means = (self._means(x, layout) for x in (q, k))
        return (q_means * q.shape[-1] ** -0.5) @ repeat_heads(k_means, q.shape[1]).transpose(-1, -2)

    def _means(self, x: torch.Tensor, layout: VideoLayout) -> torch.Tensor:
        """The mean token of each cube of `[B, H, N, D]`: `[B, H, n, D]` in float32 or better, rounded to the dtype of x
        as published code keeps it."""
        wide = torch.promote_types(x.dtype, torch.float32)
        sums = x[:, :, layout.video].unflatten(2, layout.grid)
        for dim, edge in zip((4, 3, 2), reversed(self.cube), strict=True):  # columns, rows, frames
            # Not padded to whole cubes, which would copy the tensor.
            whole = sums.shape[dim] // edge * edge
            cubes, rest = sums.narrow(dim, 0, whole), sums.narrow(dim, whole, sums.shape[dim] - whole)
            sums = cubes.unflatten(dim, (-1, edge)).sum(dim + 1, dtype=wide)
            if rest.shape[dim]:
                sums = torch.cat([sums, rest.sum(dim, keepdim=True, dtype=wide)], dim)
        means = sums.flatten(2, 4) / self._sizes(layout, x.device).unsqueeze(-1)
        return means.to(x.dtype).to(wide)

    # Made on the device, since a copy to it would wait.

    def _sizes(self, layout: VideoLayout, device: torch.device) -> torch.Tensor:
        """Tokens of each cube, `[n]` int64: fewer at the far edges."""
        frames, rows, columns = (
            (size - torch.arange(0, size, edge, device=device)).clamp(max=edge)
            for size, edge in zip(layout.grid, self.cube, strict=True)
        )
        return (frames[:, None, None] * rows[:, None] * columns).flatten()

    def _cube_of(self, layout: VideoLayout, device: torch.device) -> torch.Tensor:
        """The cube of each token of the video, int64; cubes come in the order of frames, rows and columns."""
        frame, row, column = (
            torch.arange(size, device=device) // edge for size, edge in zip(layout.grid, self.cube, strict=True)
        )
        _, rows, columns = self.cubes(layout)
        return ((frame[:, None, None] * rows + row[:, None]) * columns + column).flatten()

    def _order(self, layout: VideoLayout, device: torch.device) -> torch.Tensor:
        """The tokens of the sequence sorted by cube, with the text at the end, `[1, 1, N]` int64."""
        return text_last(self._cube_of(layout, device).argsort(stable=True).view(1, 1, -1), layout)
