"""Sparse VideoGen: each head is spatial or temporal, found online, and both are one band in their own token order."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from ..groups import by_group
from ..layout import VideoLayout
from ..own_kernels import use_kernels
from ..plan import BlockPlan
from ..schedule import DenseSchedule
from .base import (
    SINK_SHARE,
    Method,
    OutOfReach,
    PlanMemory,
    check_count,
    check_flag,
    check_fraction,
    check_seed,
    first_frame_pays,
    printable,
)

# Sets of profiled rows kept per layout and used in turn: one set would judge every layer by the same tokens, a fresh
# one for every call would pay for its masks again.
ROW_SETS = 4
# Profiled by one kernel on a GPU, by the bytes of a number: its accumulators hold no more, and those of float32 with
# 64 rows neither fit in 99 KiB of shared memory nor are computed exactly by Triton before 3.9 on compute capability 10.
KERNEL_ROWS = {2: 64, 4: 32}
PROFILED_HEADS = 4  # at once: float32 copies of all heads would be gigabytes on a large model


@dataclass(frozen=True, kw_only=True)
class SVG(Method):
    """Sparse VideoGen (arXiv 2502.01776, sections 4.1 to 4.3).

    A *spatial* head looks at the same and nearby frames: a band around the diagonal of the frame-major sequence. A
    *temporal* head looks at the same place in all frames: the same band once the tokens are ordered patch by patch.
    Each sparse call decides for each head by a sample of query rows: the true output against the output under either
    mask, by mean squared error. The masks judged are the masks executed. Since each query head has an order of its own,
    k and v of fewer heads are repeated where they are put in order.

    Args:
        density: share of all query-key pairs computed, text and first frame included, in (0, 1]; the width of the band
            follows from it. The smallest possible value depends on the layout. Temporal heads compute up to 3 % less,
            since the first frame and their band overlap elsewhere.
        profile_rows: query rows sampled over the whole sequence, at least 1. The published code samples 64; 32 halve
            the cost of planning, and the choice of a few heads that are nearly either may differ.
        tile: queries per tile; by the length of the sequence when None.
        sink: whether every query also reads the whole first frame; when None, where that frame is at most a fifth of
            `density`, so not in short videos. In temporal heads, whose keys are permuted, the published code reads
            as many keys at the front of the permuted order instead, which was further from dense where compared
            (0.250 against 0.179 relative error of one call).
        seed: of the choice of rows.
        schedule: dense steps and layers; a quarter of the steps by default, as in the paper. The published code also
            keeps the first layers dense, .025 to .03 of them by model; here none are, and `first_layers=0.03` does it.

    Raises:
        ValueError: a value outside its bound.
    """

    name: ClassVar[str] = "svg"
    summary: ClassVar[str] = "heads profiled online as spatial or temporal, each a band in its own token order"
    good_for: ClassVar[str] = "any resolution and length; cheap planning that follows each head"
    costs: ClassVar[str] = "one of two fixed shapes per head; heads that are neither lose detail"
    source: ClassVar[str] = "Sparse VideoGen, arXiv 2502.01776"

    density: float = 0.3
    profile_rows: int = 32
    tile: int | None = None
    sink: bool | None = None
    seed: int = 0
    schedule: DenseSchedule = field(default_factory=lambda: DenseSchedule(first_steps=0.25))

    def __post_init__(self) -> None:
        check_fraction("SVG", "density", self.density, fix="0.3 computes 30 % of the pairs")
        check_count("SVG", "profile_rows", self.profile_rows, 1)
        check_flag("SVG", "sink", self.sink, or_none=True)
        if self.tile is not None:
            check_count("SVG", "tile", self.tile, 1)
        check_seed("SVG", self.seed)

    def check(self, layout: VideoLayout) -> None:
        self.band_width(layout)

    def plan(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VideoLayout, memory: PlanMemory
    ) -> BlockPlan:
        if (self, layout) not in memory.layout:
            memory.layout[self, layout] = _Static(self, layout, q.device)
        static: _Static = memory.layout[self, layout]
        calls = memory.counts.get("svg_calls", memory.turn)
        memory.counts["svg_calls"] = calls + 1
        temporal = static.profile(q, k, v, calls % ROW_SETS)
        return static.combine(temporal).with_details(temporal=temporal.float().mean(0))

    def band_width(self, layout: VideoLayout) -> int:
        """Tokens on either side of a tile that give a spatial head the wanted density, the nearest from above.

        Raises:
            OutOfReach: even the narrowest band computes more than `density`.
        """
        low, high = 0, layout.video_tokens
        if not self._allowed(layout, self.density):
            bounds = self._bounds(layout)
            printed = next((x for x in map(printable, bounds) if self._allowed(layout, x)), 1.0)
            raise OutOfReach(
                f"SVG density {self.density} is below {printed:.3f}, the least for {layout} with tiles of "
                f"{self.tile_size(layout)} queries"
                + (f" and the {layout.beside}, which stays dense" if layout.text_tokens else "")
                + ": raise density to that"
                + (", use a smaller tile" if self.tile_size(layout) > 1 else "")
                + (" or sink=False" if self._has_sink(layout) else "")
                + ".",
                "density",
                self.density,
                least=next((x for x in bounds if self._allowed(layout, x)), 1.0),
                eased_by=("tile", "sink"),
            )
        while low < high:
            middle = (low + high) // 2
            if self._density(layout, middle) >= self.density:
                high = middle
            else:
                low = middle + 1
        return low

    def _allowed(self, layout: VideoLayout, density: float) -> bool:
        """Whether the narrowest band computes no more than a density, at which there may be a sink or none."""
        return replace(self, density=density)._density(layout, 0) <= density

    def _bounds(self, layout: VideoLayout) -> list[float]:
        """Where densities above one that is not allowed may begin to be."""
        bounds = [self._density(layout, 0)]
        if self.sink is None and not self._has_sink(layout):  # raised that far, there may be one, which costs more
            begins = layout.tokens_per_frame / layout.tokens / SINK_SHARE
            bounds.append(max(begins, replace(self, sink=True)._density(layout, 0)))
        return bounds

    def tile_size(self, layout: VideoLayout) -> int:
        """Queries per tile, about a hundredth of the sequence: kernels want large ones, but a tile must stay a small
        part of the whole."""
        if self.tile is not None:
            return self.tile
        return min(128, max(8, 1 << (layout.tokens // 100).bit_length() >> 1))

    def band(self, layout: VideoLayout, width: int, temporal: bool, device: torch.device | str = "cpu") -> BlockPlan:
        """The plan of a spatial or a temporal head, broadcast over batch and heads.

        Both orders put the text first. With a sink the keys of the first frame come next, in one run; the keys behind
        them keep the order of the band.
        """
        text, video, frame = layout.text_tokens, layout.video_tokens, layout.tokens_per_frame
        size = self.tile_size(layout)
        starts = torch.arange(0, video, size)
        ends = (starts + size).clamp(max=video)
        low, high = (starts - width).clamp(min=0), (ends + width).clamp(max=video)
        prefix = text
        if self._has_sink(layout):
            prefix += frame
            if temporal:  # keys below a position that are not of the first frame: each patch starts with one that is
                low, high = (x - (x + layout.frames - 1) // layout.frames for x in (low, high))
            else:
                low, high = ((x - frame).clamp(min=0) for x in (low, high))
        run_start = torch.stack([torch.zeros_like(low), low + prefix], -1)
        run_len = torch.stack([torch.full_like(low, prefix), high - low], -1)
        tile_start, tile_len = starts + text, ends - starts
        if text:  # one tile of text queries, which read everything
            tile_start, tile_len = (torch.cat([torch.tensor([x]), t]) for x, t in ((0, tile_start), (text, tile_len)))
            run_start = torch.cat([torch.tensor([[0, 0]]), run_start])
            run_len = torch.cat([torch.tensor([[layout.tokens, 0]]), run_len])
        q_order = layout.token_major_order() if temporal else layout.video_last_order()
        kv_order = q_order
        if self._has_sink(layout) and temporal:
            kv_order = torch.cat([layout.video_last_order()[:prefix], _without_first_frame(q_order, layout)])
        tile_start, tile_len, run_start, run_len = (
            x.int()[None, None] for x in (tile_start, tile_len, run_start, run_len)
        )
        plan = BlockPlan(
            layout.tokens,
            layout.tokens,
            tile_start,
            tile_len,
            run_start,
            run_len,
            q_order[None, None],
            kv_order[None, None],
        )
        return plan.to(device)

    def expected_density(self, layout: VideoLayout) -> float | None:
        return self._density(layout, self.band_width(layout))

    def _has_sink(self, layout: VideoLayout) -> bool:
        if self.sink is not None:
            return self.sink
        return first_frame_pays(layout, self.density)

    def _density(self, layout: VideoLayout, width: int) -> float:
        return self.band(layout, width, temporal=False).density()


def _without_first_frame(order: torch.Tensor, layout: VideoLayout) -> torch.Tensor:
    """The entries of an order that are video but not of the first frame."""
    later = (order >= layout.text_before + layout.tokens_per_frame) & (order < layout.video.stop)
    return order[later]


class _Static:
    """What of a config and a layout never changes: both plans, and the rows that are profiled with their masks."""

    def __init__(self, config: SVG, layout: VideoLayout, device: torch.device) -> None:
        width = config.band_width(layout)
        self.spatial, self.temporal = (config.band(layout, width, t, device) for t in (False, True))
        rows = min(config.profile_rows, layout.tokens)
        generator = torch.Generator("cpu").manual_seed(config.seed)
        drawn = (torch.randperm(layout.tokens, generator=generator, device="cpu") for _ in range(ROW_SETS))
        self.rows = [order[:rows].sort().values.to(device) for order in drawn]
        # [2, R, N]: additive would need a float each, a bool is a quarter of that
        self.masks = [torch.cat([p.rows(r)[0] for p in (self.spatial, self.temporal)]) for r in self.rows]

    def profile(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, which: int) -> torch.Tensor:
        """Which heads are temporal, `[B, H]` bool."""
        if use_kernels(q) and len(self.rows[which]) <= KERNEL_ROWS[q.element_size()]:
            from ..kernels.profile import attend_rows

            full, masked = attend_rows(q[:, :, self.rows[which]], k, v, self.masks[which], q.shape[-1] ** -0.5)
            spatial, temporal = (masked - full.unsqueeze(2)).square().mean((-1, -2)).unbind(2)
            return temporal < spatial
        heads = k.shape[1]
        step = max(1, PROFILED_HEADS * heads // q.shape[1])  # heads of k and v, with the query heads that read them
        q = by_group(q[:, :, self.rows[which]], heads)
        parts = [x.split(step, dim=1) for x in (q, k, v)]
        return torch.cat([self._profile(a, b, c, self.masks[which]) for a, b, c in zip(*parts, strict=True)], dim=1)

    def _profile(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """For some heads of k and v, whose query heads lie one after the other in `q [B, h, H / Hkv * R, D]`."""
        weights = torch.softmax(q.float() * q.shape[-1] ** -0.5 @ k.float().transpose(-1, -2), -1)
        values = v.float()
        full = weights @ values
        errors = []
        for mask in masks:
            kept = (weights.unflatten(2, (-1, len(mask))) * mask).flatten(2, 3)
            # Renormalising the kept weights is the softmax under the mask. A row always keeps its own tile.
            masked = (kept @ values) / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            errors.append((masked - full).square().unflatten(2, (-1, len(mask))).mean((-1, -2)).flatten(1, 2))
        return errors[1] < errors[0]

    def combine(self, temporal: torch.Tensor) -> BlockPlan:
        """One plan `[B, H]` from the decision."""
        choice = temporal.unsqueeze(-1)
        spatial, other = self.spatial, self.temporal
        return BlockPlan(
            spatial.n_q,
            spatial.n_kv,
            spatial.tile_start.expand(*temporal.shape, -1).contiguous(),
            spatial.tile_len.expand(*temporal.shape, -1).contiguous(),
            torch.where(choice.unsqueeze(-1), other.run_start, spatial.run_start),
            torch.where(choice.unsqueeze(-1), other.run_len, spatial.run_len),
            torch.where(choice, other.q_order, spatial.q_order),
            torch.where(choice, other.kv_order, spatial.kv_order),
            choice=(temporal, (spatial, other)),
        )
