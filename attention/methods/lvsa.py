"""LVSA: each frame reads its neighbours and a few anchor frames, which move on from step to step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import ClassVar

import torch

from ..layout import VideoLayout
from ..plan import BlockPlan
from ..schedule import DenseSchedule
from .base import Method, OutOfReach, PlanMemory, check_count, check_fraction, either

_TOLERANCE = 0.02  # of a density, beyond what the masks can have


@dataclass(frozen=True, kw_only=True)
class LVSA(Method):
    """Long Video Sparse Attention (arXiv 2605.31057): for videos longer than a model was trained on, without training.

    Every frame reads the *anchors*, which are the first frames and every n-th, and of the other frames the
    `2 * window + 1` nearest to it, itself among them unless it is an anchor; none with a window of 0. At the ends of
    the video the window is shifted, so each frame reads as many frames as any other: about as many as in a video of
    the training. With each sparse step, the every n-th frames move on by one, round the end of the video, so that no
    grid of frames stands out. Text reads and is read by all. A video of no more than `reference` frames is dense.

    The interval n of the anchors follows from `reference` where it is not given, as in the code that the authors
    published: the largest with which anchors and window make `reference` frames, or `ceil((frames - m) / (reference -
    m))`, `m = 2 * window + first_frames`, if that is larger. That code has steps at the start and the end that read
    anchors alone; here, dense ones are what `schedule` is for.

    Args:
        reference: latent frames of the videos that the model was trained on. 21 is Wan's.
        window: frames on either side, 3 as published. 0 is the published code's mode of anchors alone: there is no
            window then, so a frame that is no anchor does not read its own tokens either.
        first_frames: frames at the start that are always anchors.
        interval: n, from 1; None for what follows from `reference`.
        rotate: move the anchors on; False keeps them where they are.
        schedule: the steps and layers that stay dense; none by default.

    Raises:
        ValueError: a value out of its bounds.
    """

    name: ClassVar[str] = "lvsa"
    summary: ClassVar[str] = "a window of frames, and anchor frames that move on from step to step"
    good_for: ClassVar[str] = "videos longer than the model was trained on, without training"
    costs: ClassVar[str] = "frames far apart meet only at the anchors; nothing in videos of the usual length"
    source: ClassVar[str] = "LVSA, arXiv 2605.31057"

    reference: int = 21
    window: int = 3
    first_frames: int = 1
    interval: int | None = None
    rotate: bool = True
    schedule: DenseSchedule = field(default_factory=DenseSchedule)

    def __post_init__(self) -> None:
        check_count("LVSA", "reference", self.reference, 1)
        check_count("LVSA", "window", self.window, 0)
        check_count("LVSA", "first_frames", self.first_frames, 0)
        if self.interval is not None:
            check_count("LVSA", "interval", self.interval, 1)
        if not isinstance(self.rotate, bool):
            raise ValueError(f"LVSA rotate is {self.rotate!r}: it must be True or False.")

    @classmethod
    def for_density(cls, layout: VideoLayout, density: float, **settings: object) -> LVSA:  # type: ignore[override]
        """The config whose masks on `layout` are nearest to a density in the mean over their turns, by the interval of
        the anchors, and by a narrower window where one of 3 frames is too much: down to 1, since with 0 frames would
        not read themselves, which is only done where it is asked for. A window or an interval that is given stays.

        Raises:
            ValueError: a density out of range, or a setting. OutOfReach: a density that cannot be had.
        """
        check_fraction("LVSA.for_density", "density", density, fix="0.5 is usual")
        given = {"reference": 1, **settings}
        base = cls(**given)  # type: ignore[arg-type]
        windows = [base.window] if "window" in given else range(base.window, 0, -1)
        intervals = range(1, layout.frames + 1) if base.interval is None else [base.interval]
        found = [replace(base, window=window, interval=interval) for window in windows for interval in intervals]
        densities = [config.expected_density(layout) for config in found]
        least, most = min(densities), max(densities)
        if not least - _TOLERANCE <= density <= most + _TOLERANCE:
            kept = [name for name in ("window", "interval") if given.get(name) is not None]
            told = ", ".join(f"{name} {getattr(base, name)}" for name in kept)
            raise OutOfReach(
                f"LVSA cannot reach density {density:g} with {layout.frames} frames{f' and {told}' if kept else ''}: "
                f"{least:.3f} to {most:.3f} is possible. Give such a density"
                f"{f', or another {either(kept)}' if kept else ''}.",
                "density",
                density,
                least=least,
                most=most,
                eased_by=tuple(kept),
            )
        return found[min(range(len(found)), key=lambda at: (abs(densities[at] - density), at))]

    def interval_of(self, frames: int) -> int:
        """n for a video of so many latent frames."""
        if self.interval is not None:
            return self.interval
        if frames <= self.reference:
            return 1
        wanted = max(self.first_frames, self.reference - min(2 * self.window + 1, frames), 1)
        strict = next(n for n in range(frames, 0, -1) if len(self._anchors(frames, n, 0)) >= wanted)
        fixed = 2 * self.window + self.first_frames
        loose = math.ceil(max(frames - fixed, self.reference - fixed) / max(self.reference - fixed, 1))
        return max(strict, loose)

    def frames_read(self, frames: int, turn: int = 0) -> torch.Tensor:
        """Which frames each frame reads.

        Args:
            frames: of the video, in latents.
            turn: sparse steps before this one.

        Returns:
            `[frames, frames]` bool.
        """
        interval = self.interval_of(frames)
        anchors = torch.zeros(frames, dtype=torch.bool)
        anchors[self._anchors(frames, interval, turn % interval if self.rotate else 0)] = True
        number = torch.arange(frames)
        distance = (number[:, None] - number).abs()
        # Anchors come last, and of two frames at one distance the earlier comes first.
        order = (2 * distance + (number > number[:, None]) + anchors * 4 * frames).argsort(-1)
        nearest = torch.zeros(frames, frames, dtype=torch.bool)
        count = min(self._nearest, int((~anchors).sum()))
        nearest.scatter_(1, order[:, :count], True)
        return nearest | anchors

    def expected_density(self, layout: VideoLayout) -> float:
        """The mean over the turns: fewer frames are read where moving anchors are among the first, as in the first."""
        frames = layout.frames
        interval = self.interval_of(frames)
        turns = range(min(interval, frames) if self.rotate else 1)
        anchors = [len(self._anchors(frames, interval, turn)) for turn in turns]
        share = fmean(count + min(self._nearest, frames - count) for count in anchors) / frames
        return 1 - (1 - share) * (layout.video_tokens / layout.tokens) ** 2

    def plan(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VideoLayout, memory: PlanMemory
    ) -> BlockPlan:
        """The plan of this step, one for all batches and heads, of which `memory.layout` has one for each turn."""
        interval = self.interval_of(layout.frames)
        turn = memory.counts.get("turn", memory.turn) % interval if self.rotate else 0
        memory.counts["turn"] = turn + 1
        if (self, layout, turn) not in memory.layout:
            memory.layout[self, layout, turn] = self._plan_at(layout, turn).to(q.device).with_details(interval=interval)
        return memory.layout[self, layout, turn]

    @property
    def _nearest(self) -> int:
        """Frames beside the anchors that each frame reads, where there are as many."""
        return 2 * self.window + 1 if self.window else 0

    def _anchors(self, frames: int, interval: int, offset: int) -> list[int]:
        """As many at every offset, but for those that are among the first ones anyway."""
        moving = ((offset + interval * n) % frames for n in range(math.ceil(frames / interval)))
        return sorted({*range(min(self.first_frames, frames)), *moving})

    def _plan_at(self, layout: VideoLayout, turn: int) -> BlockPlan:
        """A tile a frame, and one for the text on either side."""
        read = self.frames_read(layout.frames, turn)
        if read.all():
            return BlockPlan.dense(layout.tokens, layout.tokens)
        sizes = [layout.text_before, *[layout.tokens_per_frame] * layout.frames, layout.text_after]
        selected = torch.ones(len(sizes), len(sizes), dtype=torch.bool)
        selected[1:-1, 1:-1] = read
        of_each = torch.tensor(sizes).view(1, 1, -1)
        return BlockPlan.from_clusters(of_each, of_each, selected[None, None], n_q=layout.tokens, n_kv=layout.tokens)
