"""The noise that a model saw in its last steps, what it will see in the next one, and how far off that may be.

Along the way from noise to video, the noise that a model sees in the latents bends far less than what it makes of them,
which has the latents themselves in it. So a straight line through the last two computed steps foretells it well. How
well is known at each computed step, at no cost: what would have been forecast there is held against what was computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ...attention import StepInfo
from .settings import FIRST, ForecastSettings

POINTS = FIRST - 1  # of a straight line; the bend of the way is seen at the next
# Rounded to nearest, numbers of a bell curve are off by this share of the precision (`finfo.eps`), by the root mean
# square.
ROUNDING = 0.19


@dataclass
class _Branch:
    """What is known of one branch of guidance.

    Args:
        points: of the last computed steps, where on the way they are and the noise that was seen.
        bend: error of a forecast by its distances from both points; None before there was one to compare with.
        step: the last one that was computed.
    """

    points: list[tuple[float, list[torch.Tensor]]] = field(default_factory=list)
    bend: torch.Tensor | float | None = None
    step: int = -1

    def distances(self, place: float) -> float:
        """The product of the distances from both points, with which the error of a straight line grows."""
        return abs((place - self.points[0][0]) * (place - self.points[1][0]))

    def _weight(self, place: float) -> float:
        """Of the later point on the line at a place; the earlier one has the rest to 1."""
        (before, _), (last, _) = self.points
        return (place - before) / (last - before)

    def ahead(self, place: float) -> list[torch.Tensor]:
        """The noise on the line through both points."""
        (_, older), (_, newer) = self.points
        return [torch.lerp(a, b, self._weight(place)) for a, b in zip(older, newer, strict=True)]

    def _rounding(self, place: float, rounding: float) -> float:
        """What of a forecast's error is but the rounding of the latents in all three steps."""
        weight = self._weight(place)
        return rounding * (1 + weight**2 + (1 - weight) ** 2) ** 0.5

    def add(self, place: float, noise: list[torch.Tensor], rounding: float) -> None:
        """Take a computed step, and the error that a forecast of it would have had."""
        if self.points and [x.shape for x in noise] != [x.shape for x in self.points[-1][1]]:
            self.points, self.bend = [], None
        if len(self.points) == POINTS and (distances := self.distances(place)):
            off = _difference(noise, self.ahead(place))
            self.bend = (off.square() - self._rounding(place, rounding) ** 2).clamp(min=0).sqrt() / distances
        kept = [point for point in self.points if point[0] != place]
        self.points = [*kept[-POINTS + 1 :], (place, noise)]

    def error(self, place: float) -> float:
        """How far a forecast would be off, as a share of what is forecast; infinite where nothing is known.

        Of latents at a level at which others were computed just before (the second row of a second-order scheduler)
        nothing is, either; where those were forecast, the line goes on to both.
        """
        if self.bend is None or len(self.points) < POINTS or not self.distances(place):
            return float("inf")
        self.bend = float(self.bend)  # a wait for the device, once for each computed pass
        return self.bend * self.distances(place)


class _Way:
    """The way of the latents themselves. Noise that somebody adds on it shows as a jump, of which no forecast knew.

    The velocity on it changes about as much from one step to the next as it did before. On the built-in model a
    computed step after five forecast ones changes it by a third at the most, up to ten times as much as usual; noise of
    0.05 added once by three quarters, and a stochastic solver by its whole.
    """

    JUMP = 0.5  # of the velocity, at the least
    UNUSUAL = 4.0  # times as much as the most of the steps before

    def __init__(self) -> None:
        self._place: float | None = None
        self._latents: torch.Tensor | None = None
        self._velocity: torch.Tensor | None = None
        self._length = 0.0
        self._usual: list[float] = []
        self._turns: list[bool] = []

    def turns_back(self) -> bool:
        """Whether the latents went back in most steps, by more than a right angle: noise that is another one in each
        step takes them somewhere and then back, and what a model makes of them does not."""
        return 2 * sum(self._turns) > len(self._turns)

    def jumps(self, place: float, latents: torch.Tensor) -> bool:
        """Whether the latents of a step, float32, are not where the way led to."""
        before, self._place = self._place, place
        x, self._latents = self._latents, latents
        if x is None or before is None or x.shape != latents.shape or place == before:
            return False
        length, velocity = abs(place - before), (latents - x) / (place - before)
        old, old_length = self._velocity, self._length
        self._velocity, self._length = velocity, length
        if old is None or old.shape != velocity.shape:
            return False
        norms = torch.stack([torch.linalg.vector_norm(x) for x in (velocity - old, velocity, old)])
        change, size, old_size = norms.tolist()
        self._turns.append(change**2 > size**2 + old_size**2)
        bend = 2 * change / (length + old_length)
        unusual = bool(self._usual) and bend > self.UNUSUAL * max(self._usual)
        self._usual = [*self._usual[-2:], bend]
        return unusual and change > self.JUMP * size


class Forecasts:
    """Which steps of a run have to be computed, and what stands for the noise in the others. One transformer's.

    Args:
        settings: what it goes by.
    """

    def __init__(self, settings: ForecastSettings) -> None:
        self._settings = settings
        self.agree: Callable[[float, torch.device], float] | None = None
        """Where processes compute a branch each: gives all of them the largest of their errors, and is asked by all in
        the same steps."""
        self.begin()

    def begin(self) -> None:
        """Forget what is known: a run begins."""
        self._branches: dict[str, _Branch] = {}
        self._way = _Way()
        self._step: int | None = None
        self._latest = -1  # the last step that was computed
        self._forecast, self._in_a_row = False, 0
        self.errors: list[float] = []
        """Estimated, of the steps that were forecast."""
        self.refused: list[float] = []
        """Estimated, of those that were computed because it was too much."""

    def new_noise(self) -> bool:
        """Whether somebody seems to add noise in each step, of which no forecast knows."""
        return self._way.turns_back()

    def start_anew(self) -> None:
        """Forget the lines: from here on the latents go another way. What was told of errors stays."""
        self._branches = {}

    def computes(self, step: StepInfo, place: float, latents: torch.Tensor, keep: bool = False) -> bool:
        """Whether a pass has to be computed. All branches of a step are, or none of those that the last computed step
        had: guidance multiplies what differs.

        Args:
            step: that runs.
            place: of it on the way, see `Level.place`.
            latents: of it, float32, as a flow mixes them (`Level.of_flow`).
            keep: it has to be, for a reason of somebody else.
        """
        if step.step != self._step:
            self._step = step.step
            if self._way.jumps(place, latents):
                self.start_anew()
            self._forecast = self._near(step, place, keep, latents.device)
            self._in_a_row = self._in_a_row + 1 if self._forecast else 0
        return keep or not self._forecast or not self._is_known(step.branch)

    def _is_known(self, name: str) -> bool:
        """Whether a branch was computed in the last computed step, and often enough."""
        branch = self._branches.get(name)
        return branch is not None and len(branch.points) == POINTS and branch.step == self._latest

    def _near(self, step: StepInfo, place: float, keep: bool, device: torch.device) -> bool:
        """Whether the forecast of a step is near enough."""
        its = self._settings
        # By what all processes know alike, as they know what they agreed on.
        if step.step < its.first_steps or (step.num_steps is not None and step.step >= step.num_steps - its.last_steps):
            return False
        if its.most and self._in_a_row >= its.most:
            return False
        error = float("inf") if keep else self._error(place)
        if self.agree is not None:
            error = self.agree(error if self._is_known(step.branch) else float("inf"), device)
        near = error <= its.tolerance
        if not keep and self._branches:
            (self.errors if near else self.refused).append(error)
        return near

    def _error(self, place: float) -> float:
        """How far the forecasts of all branches are estimated to be off; infinite where nothing is known."""
        # Guidance may leave a branch out in some steps, or another process have it.
        going_on = [branch for branch in self._branches.values() if branch.step == self._latest]
        # Of noise and of what a flow makes, the difference is the same but for the share of the video.
        return max((branch.error(place) for branch in going_on), default=float("inf")) / max(1 - place, 1e-9)

    def add(self, step: StepInfo, place: float, noise: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
        """Take the noise, float32, that a computed pass saw in each of its latents, which it got in a `dtype`."""
        branch = self._branches.setdefault(step.branch, _Branch())
        branch.add(place, list(noise), ROUNDING * torch.finfo(dtype).eps)
        branch.step = self._latest = step.step

    def let_go(self) -> None:
        """Of all tensors: no more passes come."""
        self._branches, self._way = {}, _Way()

    def ahead(self, step: StepInfo, place: float) -> list[torch.Tensor]:
        """What stands for the noise of a pass that is not computed."""
        return self._branches[step.branch].ahead(place)


def _difference(made: Sequence[torch.Tensor], foretold: Sequence[torch.Tensor]) -> torch.Tensor:
    """Relative to what was made: that of the sample and the tensor where it is largest."""
    worst = []
    for a, b in zip(made, foretold, strict=True):
        rows, off = a.flatten(1), (a - b).flatten(1)
        size = torch.linalg.vector_norm(rows, dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        worst.append((torch.linalg.vector_norm(off, dim=-1) / size).max())
    return torch.stack(worst).max()
