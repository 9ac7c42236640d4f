"""Radial Attention: a static mask whose windows halve with every doubling of the distance between frames.

Words used here: the *distance* `d = |i - j|` of query frame `i` and key frame `j`; the *place* of a token, its number
within its frame of `s` tokens; the *window* `w(d)`: a query at place `x` reads the keys of frame `j` at places `y` with
`|y - x| <= w(d)`. With `p` the largest power of two that is not above `s`, the published windows are

    w(0) = w(1) = s        w(d) = max(block_size, decay * L(d)) for d >= 2        L(d) = p / 2**floor(log2(d))

and frames are *thinned*: where `L(d)` is below 128 tokens, only every `128 / L(d)`-th distance is read at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch

from ..account.plain_values import of_python
from ..layout import VideoLayout
from ..plan import BlockPlan
from ..schedule import DenseSchedule
from .base import Method, OutOfReach, PlanMemory, check_count, check_fraction, first_frame_pays, is_number

_THIN_BELOW = 128  # tokens; the published generator uses it at any block size
_LEAST_BLOCK = 8  # tokens
_BLOCKS_PER_FRAME = 8  # at least so many where a size is chosen here
_CHUNK = 64  # parts of the query axis worked on at once: bounds the memory
_TOLERANCE = 0.005  # of a density that is searched for


@dataclass(frozen=True)
class Radial(Method):
    """Radial Attention (arXiv 2506.19852, section 4): a mask from the geometry alone, the same for all heads and steps.

    **`rule="exact"`** takes any grid, with text on either side. Blocks lie on a ceiling grid over the whole sequence. A
    block of queries against a block of keys falls into *parts*, one per pair of frames it touches. It is kept when, in
    at least one part, the window covers half of the token pairs or more, or a query meets the key of its own place.
    Kept blocks are computed whole, so at one half the area kept is about the area asked for; keeping all that is
    touched would add about one block per row and frame. Judging parts, not the whole block, keeps the last tokens of a
    frame that ends inside a block. It follows that every query reads itself, its own place in each frame that is not
    thinned out, the whole sink and all text, and that text reads everything. Windows are those above, so published
    decays carry over. Frames of 1,024 tokens or more are thinned as published; smaller ones below a smaller `L(d)`, the
    block size that None chooses; distances that are powers of two always stay.

    **`rule="published"`** equals the published generator block for block: kept when more than 60 % of the non-empty
    columns have more than a third of their rows set. It needs whole blocks per frame and no text before the video.

    Args:
        block_size: tokens per block of queries and of keys, 8 to 1024. None chooses: 128 for the published rule; else
            the largest of 128, 64, 32, 16 that leaves 8 blocks per frame, or 8. Wan at 480p and 720p gets 128.
            Small blocks follow the windows closely, large ones compute faster at the same density.
        decay: scale of the windows at distances of 2 and more, above 0. Published: 0.2 for Wan 2.1 (block 128), 0.8 for
            Wan 2.2 (block 64), 0.95 for HunyuanVideo, 1 for videos longer than the model was trained on. Above 1
            (not published) windows outgrow `L(d)`, and with "exact" thinning weakens alike: large values reach dense.
        sink: frames at the start that every query reads whole; True is 1, False is 0. Published: 1 for Wan, 0 for
            HunyuanVideo.
        rule: "exact" or "published". "exact" is denser where a frame has few tokens: at 33 frames of 16 x 16 with
            decay 1, 0.875 against 0.458 of the pairs in blocks of 128, and 0.467 in blocks of 32, which None chooses.
        near: scale, above 0 to 1, of the windows of a frame itself, `w(0) = min(2 * near, 1) * s`, and of its
            neighbours, `w(1) = near * s`. 1 reads both whole; 0.5 is what later published code does for Wan.
        min_window: narrowest window at distances of 2 and more, in blocks, 0 or more. At 1 (published) two or three
            blocks per row and frame remain, at 0 those with the query's own place. Only "exact" has it, and the next.
        thinning: factor on the `L(d)` below which frames are thinned, a whole number; from 16 on (frames of up to
            4,095 tokens), only distances that are powers of two remain.
        schedule: dense steps and layers; by default the published first layer and 12 of 50 steps.

    Raises:
        ValueError: a value outside its bounds, or settings that the published rule does not have.
    """

    name: ClassVar[str] = "radial"
    summary: ClassVar[str] = (
        "static mask: near frames whole, windows that halve as frames lie further away, frame 0 whole"
    )
    good_for: ClassVar[str] = "long videos: density falls with length, and one plan serves all heads, layers and steps"
    costs: ClassVar[str] = (
        "no planning after the first call, but blind to content; with few frames little can be skipped"
    )
    source: ClassVar[str] = "Radial Attention, arXiv 2506.19852, section 4"

    block_size: int | None = None
    decay: float = 0.2
    sink: bool | int = True
    rule: str = "exact"
    near: float = 1.0
    min_window: float = 1.0
    thinning: int = 1
    schedule: DenseSchedule = field(
        default_factory=lambda: DenseSchedule(first_steps=0.24, first_layers=1), kw_only=True
    )

    def __post_init__(self) -> None:
        if self.block_size is not None:
            check_count("Radial", "block_size", self.block_size, _LEAST_BLOCK)
            if self.block_size > 1024:
                raise ValueError(f"Radial block_size is {self.block_size}: it must be at most 1024 tokens; try 128.")
        if not is_number(self.decay) or self.decay <= 0:
            raise ValueError(
                f"Radial decay is {self.decay!r}: it must be a finite number above 0; 0.2 is published for Wan 2.1, "
                f"1 for long videos.{of_python(self.decay)}"
            )
        if not is_number(self.min_window) or self.min_window < 0:
            raise ValueError(
                f"Radial min_window is {self.min_window!r}: it must be a finite number of blocks, 0 or more; "
                f"1 is published.{of_python(self.min_window)}"
            )
        if not isinstance(self.sink, bool):
            check_count("Radial", "sink", self.sink, 0)
        if self.rule not in ("exact", "published"):
            raise ValueError(f'Radial rule is {self.rule!r}: choose "exact" (any grid) or "published".')
        check_fraction("Radial", "near", self.near, fix="1 reads a frame and its neighbours whole")
        check_count("Radial", "thinning", self.thinning, 1)
        if self.rule == "published" and (self.min_window != 1 or self.thinning != 1 or self.sink > 1):
            raise ValueError(
                f'Radial rule "published" has neither min_window={self.min_window} nor thinning={self.thinning} nor '
                f'sink={self.sink}: leave them at 1, 1 and at most 1 frame, or use rule="exact".'
            )

    def resolved_block_size(self, layout: VideoLayout) -> int:
        """Tokens per block for this layout."""
        if self.block_size is not None:
            return self.block_size
        return 128 if self.rule == "published" else _fitting_size(layout.tokens_per_frame)

    def block_mask(self, layout: VideoLayout) -> torch.Tensor:
        """The blocks that are computed.

        Args:
            layout: the sequence of N tokens.

        Returns:
            `[n, n]` bool on the CPU, `n = ceil(N / block_size)`; rows and columns of blocks that hold text are all set.

        Raises:
            ValueError: the published rule, on a layout for which it is not defined.
        """
        block = self.resolved_block_size(layout)
        build = self._published_video_mask if self.rule == "published" else self._exact_video_mask
        mask = build(layout, block)
        start = torch.arange(mask.shape[0]) * block
        text = (start < layout.video.start) | ((start + block).clamp(max=layout.tokens) > layout.video.stop)
        return mask.logical_or_(text).logical_or_(text[:, None])

    def expected_density(self, layout: VideoLayout) -> float:
        """Token pairs computed in a sparse step over those of a dense one, from 0 to 1; equals the plan's density."""
        mask, block = self.block_mask(layout), self.resolved_block_size(layout)
        missing = mask.shape[0] * block - layout.tokens  # tokens that the last block is short of
        keys = mask.sum(-1) * block - mask[:, -1] * missing
        return (int(keys.sum()) * block - int(keys[-1]) * missing) / layout.tokens**2

    def check(self, layout: VideoLayout) -> None:
        self.block_mask(layout)

    def plan(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VideoLayout, memory: PlanMemory
    ) -> BlockPlan:
        """The plan of a layout on the device of `q`, one for all batches and heads; kept in `memory.layout`.

        Args:
            q: `[B, H, N, D]`, k, v: `[B, Hkv, N, D]`; only the lengths of q and k and the device of q are read.
            layout: the sequence, `layout.tokens == N`.
            memory: where the plan is kept.

        Raises:
            ValueError: q or k of another length, or a layout for which the published rule is not defined.
        """
        for name, x in (("q", q), ("k", k)):
            if x.shape[-2] != layout.tokens:
                raise ValueError(
                    f"Radial got {name} with {x.shape[-2]} tokens, but {layout} has {layout.tokens}; "
                    "pass the layout of this sequence."
                )
        if (self, layout) not in memory.layout:
            block = self.resolved_block_size(layout)
            mask = self.block_mask(layout)
            plan = BlockPlan.from_block_mask(mask, block, block, layout.tokens, layout.tokens)
            if mask.all():
                plan = BlockPlan.dense(layout.tokens, layout.tokens)
            memory.layout[self, layout] = plan.to(q.device).with_details(block_size=block)
        return memory.layout[self, layout]

    @classmethod
    def for_density(  # type: ignore[override]  # its own settings by name
        cls,
        layout: VideoLayout,
        density: float,
        *,
        block_size: int | None = None,
        sink: bool | int | None = None,
        near: float | None = None,
        min_window: float | None = None,
        thinning: int | None = None,
        schedule: DenseSchedule | None = None,
    ) -> Radial:
        """The config, by the exact rule, whose mask on `layout` has a wanted density.

        Searched in this order until the density is met to 0.005: `decay`; `decay` with windows that may narrow to the
        query's own place (`min_window=0`); that with more `thinning`; all these with narrower neighbouring frames
        (`near` of 0.75, 0.5); smaller `near`, with the strongest thinning first. Densities come in steps, coarse ones
        where there are few blocks per frame: when none meets the wanted density, the closest is returned.

        Args:
            layout: the grid the density is meant for.
            density: token pairs computed over all token pairs, above 0 to 1.
            block_size, schedule: as in `Radial`.
            sink: as in `Radial`; when None one frame, where that is at most a fifth of `density`, else none.
            near, min_window, thinning: fixed when given, searched when None.

        Raises:
            ValueError: a density out of range.
            OutOfReach: one outside what this layout reaches with these settings.
        """
        check_fraction("Radial.for_density", "density", density, fix="0.25 is usual")
        if sink is None:
            sink = first_frame_pays(layout, density)
        base = cls(block_size, sink=sink) if schedule is None else cls(block_size, sink=sink, schedule=schedule)
        best, found, reached = base, math.inf, []
        for config_at, steps in _searches(base, layout, near, min_window, thinning):
            for config, value in _bisect(config_at, steps, layout, density):
                reached.append(value)
                if abs(value - density) < abs(found - density):
                    best, found = config, value
            if abs(found - density) <= _TOLERANCE:
                return best
        if not min(reached) - _TOLERANCE <= density <= max(reached) + _TOLERANCE:
            block = base.resolved_block_size(layout)
            given = {"near": near, "min_window": min_window, "thinning": thinning}
            held = [name for name, value in given.items() if value is not None]
            raise OutOfReach(
                f"Radial cannot reach density {density:g} with {layout.frames} frames of {layout.tokens_per_frame} "
                f"and {layout.text_tokens} tokens of {layout.beside}, blocks of {block}, sink={sink}: "
                f"{min(reached):.3f} to {max(reached):.3f} is possible{_advice(block, sink, held)}.",
                "density",
                density,
                least=min(reached),
                most=max(reached),
                eased_by=("block_size", "sink", "near", "min_window", "thinning"),
            )
        return best

    def _reach(self, d: int, s: int) -> float:
        """`L(d)` in tokens: the published window before decay."""
        return 2 ** s.bit_length() / 2 ** d.bit_length()

    def _window(self, d: int, s: int, block: int) -> int:
        """`w(d)`: the largest difference of places read at distance `d`, at most `s`."""
        if d <= 1:
            return int(min(1.0, self.near * (2 - d)) * s)
        return int(min(s, max(self.min_window * block, self._reach(d, s) * self.decay)))

    def _is_read(self, d: int, s: int) -> bool:
        """Whether frames at distance `d` are read at all by the exact rule.

        Every n-th distance is, with n a power of two: then the frames read at one decay or thinning contain those read
        at a stronger thinning, and density is monotone in both.
        """
        ratio = _fitting_size(s) * self.thinning / (self._reach(d, s) * max(1.0, self.decay))
        every = 2 ** min(int(math.log2(max(ratio, 1))), max(d.bit_length() - 1, 0))
        return d % every == 0

    def _exact_video_mask(self, layout: VideoLayout, block: int) -> torch.Tensor:
        """`[n, n]` bool, the blocks kept for video tokens; works on `_CHUNK` rows of the table of parts at a time."""
        s, frames, sink = layout.tokens_per_frame, layout.frames, int(self.sink)
        windows = torch.tensor([self._window(d, s, block) for d in range(frames)], dtype=torch.int32)
        is_read = torch.tensor([self._is_read(d, s) for d in range(frames)])
        # Pieces: the video cut at every block edge and every frame edge. A part is a query piece against a key piece.
        count = -(-layout.tokens // block)
        block_edges, frame_edges = torch.arange(count + 1) * block, layout.text_before + torch.arange(frames + 1) * s
        edges = torch.cat([block_edges, frame_edges]).clamp(layout.video.start, layout.video.stop).unique()
        of_block = edges[:-1] // block
        frame = (edges[:-1] - layout.text_before) // s
        place, size = ((edges[:-1] - layout.text_before) % s).int(), edges.diff().int()

        mask = torch.zeros(count, count, dtype=torch.bool)
        for rows in torch.arange(len(frame)).split(_CHUNK):
            distance = (frame[rows, None] - frame).abs()
            window = torch.where(frame < sink, s, windows[distance])
            # Query r and key c of a part lie at places that differ by between + c - r.
            between, size_q = place - place[rows, None], size[rows, None]
            covered = _pairs_up_to(window - between, size_q, size) - _pairs_up_to(-window - 1 - between, size_q, size)
            keep = 2 * covered >= size_q * size
            keep |= (between < size_q) & (-between < size)
            keep &= is_read[distance] | (frame < sink)
            # A block is kept when one of its parts is.
            by_key_block = torch.zeros(len(rows), count, dtype=torch.int32).index_add_(1, of_block, keep.int())
            first, last = int(of_block[rows[0]]), int(of_block[rows[-1]])
            band = torch.zeros(last - first + 1, count, dtype=torch.int32)
            mask[first : last + 1] |= band.index_add_(0, of_block[rows] - first, by_key_block) > 0
        return mask

    def _published_video_mask(self, layout: VideoLayout, block: int) -> torch.Tensor:
        """`[n, n]` bool, the blocks the published generator keeps for video tokens.

        Frames are whole numbers of blocks here, so a block depends only on the frame distance and on how many blocks
        apart its queries and keys lie within their frames: one small table holds everything.
        """
        s, frames = layout.tokens_per_frame, layout.frames
        if s % block or layout.text_before:
            raise ValueError(
                f"the published Radial generator is not defined for {s} tokens per frame in blocks of {block} with "
                f"{layout.text_before} text tokens before the video: it needs whole blocks per frame and text behind; "
                'use rule="exact", which takes any grid.'
            )
        windows = torch.tensor([self._window(d, s, block) for d in range(frames)])[:, None, None]
        # Rows set in a column of a block that lies so many blocks to the right of the diagonal one.
        column = torch.arange(s).view(-1, block)
        rows_set = ((column + windows).clamp(max=block - 1) - (column - windows).clamp(min=0) + 1).clamp(min=0)
        # In whole numbers: more than 60 % of the non-empty columns have more than 1/3 of the rows.
        kept = 5 * (3 * rows_set > block).sum(-1) > 3 * (rows_set > 0).sum(-1)
        every = [max(1, int(_THIN_BELOW / self._reach(d, s))) for d in range(frames)]
        kept &= torch.tensor([d % n == 0 for d, n in enumerate(every)])[:, None]

        frame, place = torch.arange(frames), torch.arange(s // block)
        distance, apart = (frame[:, None] - frame).abs(), (place[:, None] - place).abs()
        video = kept[distance[:, None, :, None], apart[None, :, None, :]]  # [query frame, place, key frame, place]
        video[:, :, : int(self.sink)] = True
        count, blocks = -(-layout.tokens // block), layout.video_tokens // block
        mask = torch.zeros(count, count, dtype=torch.bool)
        mask[:blocks, :blocks] = video.reshape(blocks, blocks)
        return mask


def _advice(block: int, sink: bool | int, held: list[str]) -> str:
    """What would let a search reach other densities, of what is not so already; "" for nothing."""
    fewer = (["smaller blocks"] if block > _LEAST_BLOCK else []) + (["sink=False"] if sink else [])
    told = [f"for less, use {' or '.join(fewer)}"] if fewer else []
    told += [f"leave {', '.join(held)} to the search"] if held else []
    return "".join(f"; {each}" for each in told)


def _fitting_size(tokens_per_frame: int) -> int:
    """The largest of 128, 64, 32, 16 tokens that fits in a frame `_BLOCKS_PER_FRAME` times, or 8."""
    return next((size for size in (128, 64, 32, 16) if tokens_per_frame >= _BLOCKS_PER_FRAME * size), 8)


def _pairs_up_to(bound: torch.Tensor, size_q: torch.Tensor, size_k: torch.Tensor) -> torch.Tensor:
    """How many pairs `(r, c)` with `0 <= r < size_q` and `0 <= c < size_k` have `c - r <= bound`; exact in int32."""

    def triangle(n: torch.Tensor) -> torch.Tensor:
        n = n.clamp(min=0)
        return n * (n + 1) // 2

    # Without limits the pairs fill a triangle; the limits of r and c cut two away, and count a third twice.
    bound = torch.maximum(torch.minimum(bound, size_k), -size_q)
    return triangle(bound + size_q) - triangle(bound) - triangle(bound + size_q - size_k) + triangle(bound - size_k)


def _searches(
    base: Radial, layout: VideoLayout, near: float | None, min_window: float | None, thinning: int | None
) -> Iterator[tuple[Callable[[int], Radial], int]]:
    """The one-dimensional searches of `Radial.for_density`, the least departure from the published mask first.

    Yields:
        `(config_at, steps)`: configs whose density does not fall from `config_at(1)` to `config_at(steps)`.
    """
    s, fitting = layout.tokens_per_frame, _fitting_size(layout.tokens_per_frame)
    second, last = (base._reach(max(2, d), s) for d in (2, layout.frames - 1))

    def decaying(form: Radial, n: int) -> Radial:
        return replace(form, decay=(n - 0.5) / second)

    def narrowing(form: Radial, n: int) -> Radial:
        return replace(form, near=(n - 0.5) / s)

    floors = (1.0, 0.0) if min_window is None else (min_window,)
    thinnings = [2**n for n in range(max(1, s // fitting).bit_length())] if thinning is None else [thinning]
    forms = [(floor, thinnings[0]) for floor in floors] + [(floors[-1], thin) for thin in thinnings[1:]]
    for width in (1.0, 0.75, 0.5) if near is None else (near,):
        for floor, thin in forms:
            form = replace(base, near=width, min_window=floor, thinning=thin)
            # Step n stands for a window of n - 1 tokens at distance 2; the last for whole frames, none thinned.
            steps = math.ceil(second * max(s, fitting * thin) / last) + 1
            yield partial(decaying, form), steps
    if near is None:
        for thin in reversed(thinnings):
            form = replace(base, decay=0.5 / second, min_window=floors[-1], thinning=thin)
            yield partial(narrowing, form), s


def _bisect(
    config_at: Callable[[int], Radial], steps: int, layout: VideoLayout, density: float
) -> Iterator[tuple[Radial, float]]:
    """Configs and their densities: both ends of `1..steps`, then ever closer to where the wanted density is crossed."""
    low, high, tried = 1, steps, {}
    for n in (low, high):
        tried[n] = config_at(n).expected_density(layout)
        yield config_at(n), tried[n]
    while high - low > 1 and tried[low] < density < tried[high]:
        middle = (low + high) // 2
        tried[middle] = config_at(middle).expected_density(layout)
        yield config_at(middle), tried[middle]
        low, high = (middle, high) if tried[middle] < density else (low, middle)
