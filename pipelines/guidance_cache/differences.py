"""The differences of two passes of guidance, of the steps that made both."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...attention import DenseSchedule, StepInfo
from .settings import GuidanceCache


class Differences:
    """Those of a transformer in a run: the last two, which the next ones are extrapolated from.

    Args:
        settings: which steps make both passes, and how the difference goes on.
        dense: the steps of sparse attention that are computed whole, whatever the settings say; None for none.
    """

    def __init__(self, settings: GuidanceCache, dense: DenseSchedule | None = None) -> None:
        self._settings, self._schedule, self._dense = settings, settings.schedule, dense
        self._run = -1
        self._kept: list[tuple[int, list[torch.Tensor]]] = []  # step, and first minus second pass, in float32
        self._left_out = 0  # steps since the last of them
        self.uncounted = 0
        """Steps that have to make both passes because it is not known how many there are."""
        self.kept_dense = 0
        """Steps that make both because they are dense, behind the first ones that do."""

    def wanted(self, step: StepInfo, shapes: Sequence[torch.Size], computed: bool = True) -> bool:
        """Whether a step has to make both passes.

        Args:
            step: that runs. shapes: of the tensors that its passes give.
            computed: no cache left its first pass out. What a cache makes of one pass alone is off by as much as of
                both, and their difference by more: the next difference is made where both are computed.
        """
        if step.run != self._run or (self._kept and [x.shape for x in self._kept[-1][1]] != list(shapes)):
            self._run = step.run
            self.forget()
        if len(self._kept) < 2:
            return True
        if not computed:
            return False
        if step.num_steps is None and self._schedule.needs_num_steps:
            self.uncounted += 1
            return True
        if self._schedule.step_reason(step):
            return True
        if self._dense is not None and self._dense.step_reason(step):
            self.kept_dense += 1
            return True
        # A step may have left nothing out and made no difference either, as where a sampler makes one pass alone.
        return max(self._left_out + 1, step.step - self._kept[-1][0]) >= self._settings.every

    def add(self, step: StepInfo, first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> None:
        """Take that of a step that made both passes."""
        made = [a.float() - b.float() for a, b in zip(first, second, strict=True)]
        self._kept = [*[kept for kept in self._kept if kept[0] != step.step][-1:], (step.step, made)]
        self._left_out = 0

    def second(self, step: StepInfo, first: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What stands for the second pass of a step.

        Args:
            step: that runs. first: what its first pass gave.
        """
        self._left_out += 1
        (before, older), (last, newer) = self._kept
        way = self._settings.extrapolation * (step.step - last) / (last - before)
        return [
            (x.float() - torch.lerp(old, new, 1 + way)).to(x.dtype)
            for x, old, new in zip(first, older, newer, strict=True)
        ]

    def forget(self) -> None:
        """Let go of what is kept."""
        self._kept, self._left_out = [], 0


def left_out(settings: GuidanceCache, computed: Sequence[bool], dense: DenseSchedule | None = None) -> tuple[bool, ...]:
    """Which steps of a run leave their second pass out.

    Args:
        settings: which steps make both passes, as far as it is theirs to say.
        computed: of each step, whether no cache leaves its first pass out.
        dense: see `Differences`.
    """
    differences, found = Differences(settings, dense), []
    for number, whole in enumerate(computed):
        step = StepInfo(0, number, len(computed))
        made = differences.wanted(step, (), whole)
        if not made:
            differences.second(step, ())
        elif whole:
            differences.add(step, (), ())
        found.append(not made)
    return tuple(found)
