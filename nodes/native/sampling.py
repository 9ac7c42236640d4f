"""Where a sampler of ComfyUI is: the step, the guidance branches of a batch, and which steps and layers stay dense."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...attention import DenseSchedule, StepInfo
from ..report.wording import check_shares

# Noise levels of one step that were computed on different ways differ in the last digits: 0.88888890 and 0.88888889.
SIGMA_TOLERANCE = 1e-5
# Schedulers take levels out of a table of 1000: that of a third of the sampling is the one of 333 thousandths. So much
# of the sampling may a step begin before the share that it stands for.
TABLE_STEP = 1e-3
_BY_STEPS = {"first steps": "first_steps", "last steps": "last_steps"}


@dataclass(frozen=True)
class DensePart:
    """The part of the sampling, and the layers, that stay dense.

    Percentages are ComfyUI's: of the whole schedule of noise levels, which two samplers that follow one another (the
    two models of Wan 2.2) share. With the scheduler simple they are shares of the steps, with sgm_uniform and
    ddim_uniform but for one step; with beta, linear_quadratic and kl_optimal, whose steps differ in size, they are not.

    It is no `DenseSchedule`, for three reasons. That one counts the steps of the sampler at work, which knows nothing
    of the sampler before it; its noise levels lie between 0 and 1, and ComfyUI's reach 80 (Cosmos) and, for 0 percent,
    a billion; and it counts layers from either end, where a node lists any.

    Args:
        start: share of the sampling that stays dense at its start, in [0, 1].
        end: share that stays dense at its end, in [0, 1].
        layers: transformer blocks, counted from 0.
        steps: steps of a sampler that does the whole sampling, which stay dense in the place of the shares; None where
            the shares are all there is. The shares are those of other samplers then.

    Raises:
        ValueError: a share out of bounds, or shares that leave nothing.
    """

    start: float = 0.0
    end: float = 0.0
    layers: frozenset[int] = frozenset()
    steps: DenseSchedule | None = None

    def __post_init__(self) -> None:
        check_shares(self.start, self.end, "To sample densely, take the model from before this node.")

    def step_reason(self, sigma: float, percent_to_sigma: Callable[[float], Any], levels: Sequence[float] = ()) -> str:
        """Why a step stays dense, as the input or the field of the schedule that says so; empty when it may be sparse.

        A step that begins within the share at the start is dense as a whole. Where that would keep half of a short
        sampling dense or more though less was asked for (0.3 of 4 steps), only steps that end within it are, as with
        `DenseSchedule`.

        Args:
            sigma: noise level of the step.
            percent_to_sigma: of the model's `model_sampling`.
            levels: the sampler's noise levels, falling, the last one being where it ends; none where it does not say.
        """
        whole = _whole(levels, percent_to_sigma)
        if whole and self.steps is not None:
            return _BY_STEPS.get(self.steps.step_reason(StepInfo(0, *step_of(sigma, list(levels)))), "")
        reason = self._begins_within(sigma, percent_to_sigma)
        if reason != self._names[0] or self.start + self.end >= 0.5 or not whole:
            return reason
        dense = sum(bool(self._begins_within(level, percent_to_sigma)) for level in levels[:-1])
        if 2 * dense < len(levels) - 1:
            return reason
        step, _ = step_of(sigma, list(levels))
        end, bound = levels[step + 1], float(percent_to_sigma(self.start))
        return reason if end >= bound - SIGMA_TOLERANCE * max(1.0, abs(bound)) else ""

    def _begins_within(self, sigma: float, percent_to_sigma: Callable[[float], Any]) -> str:
        slack = SIGMA_TOLERANCE * max(1.0, abs(sigma))
        start = max(self.start - TABLE_STEP, self.start / 2)  # the smallest one keeps the first step
        if self.start > 0 and sigma > float(percent_to_sigma(start)) + slack:
            return self._names[0]
        if self.end > 0 and sigma <= float(percent_to_sigma(1 - self.end - TABLE_STEP)) + slack:
            return self._names[1]
        return ""

    @property
    def _names(self) -> tuple[str, str]:
        """Who keeps steps at the start and at the end dense."""
        return ("dense_start_percent", "dense_end_percent") if self.steps is None else ("first_steps", "last_steps")

    def layer_reason(self, layer: int) -> str:
        """Why a layer stays dense, empty when it may be sparse."""
        return "dense_layers" if layer in self.layers else ""


def _whole(levels: Sequence[float], percent_to_sigma: Callable[[float], Any]) -> bool:
    """Whether a sampler does all of the sampling, and is not one of two that follow one another.

    The scheduler ddim_uniform leaves the first step out for many numbers of steps, and has one of next to nothing at
    the end: of 20 steps, at 951, 901, ..., 51 and 1 thousandths.
    """
    if len(levels) < 2 or levels[-1] > SIGMA_TOLERANCE:
        return False
    if levels[0] >= float(percent_to_sigma(0.01)):
        return True
    tiny_end = levels[-2] <= float(percent_to_sigma(1 - 3 * TABLE_STEP))
    return tiny_end and levels[0] >= float(percent_to_sigma(1 / (len(levels) - 1) + TABLE_STEP))


def parse_layers(text: str, count: int | None = None) -> frozenset[int]:
    """Layer numbers from a list such as "0, 1, 36-39".

    Args:
        text: numbers and ranges, counted from 0, both ends of a range included; empty for none.
        count: transformer blocks of the model, None when unknown.

    Raises:
        ValueError: something else in the text, a layer that the model does not have, or all that it has.
    """
    layers: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError(f'dense_layers has {part!r}: write layer numbers and ranges such as "0, 1, 36-39".')
        if count is not None and last >= count:
            raise ValueError(f"dense_layers has {part!r}, but the model has {count} layers: 0 to {count - 1}.")
        layers.update(range(first, last + 1))
    if count is not None and len(layers) == count:
        raise ValueError(
            f"dense_layers is {text}: those are all {count} layers of the model, so nothing would be sparse. Leave one "
            "out, or connect the MODEL from before this node."
        )
    return frozenset(layers)


def step_of(sigma: float, levels: list[float]) -> tuple[int, int]:
    """The step that a noise level belongs to, and how many there are.

    A sampler that evaluates the model between two levels is still in the step that began at the first of both.

    Args:
        sigma: noise level of the forward pass.
        levels: the sampler's noise levels (`sample_sigmas`), the last one being where it ends: falling, or rising where
            a video is turned into noise (FlipSigmas).
    """
    steps = max(1, len(levels) - 1)
    slack = SIGMA_TOLERANCE * max(1.0, abs(sigma))
    if levels[0] < levels[-1]:
        begun = sum(level <= sigma + slack for level in levels[:steps])
    else:
        begun = sum(level >= sigma - slack for level in levels[:steps])
    return max(0, begun - 1), steps


def branches_of(options: Mapping[str, Any], known: dict[Any, str], differing: str = "") -> list[str]:
    """A name for each condition in a batch, in its order: "cond", "uncond", and "cond 2" for a second prompt.

    Args:
        options: `transformer_options` with `cond_or_uncond` (0 is positive, 1 negative) and `uuids`.
        known: names by kind and uuid that were given before in the same run; new ones are added. The same condition
            thus has one name, whether it comes alone or in a batch with others. One with an area is of both kinds:
            ComfyUI adds it to the other side, with its uuid. In a context window, and where blocks are replaced, it is
            another branch: clusters of other frames, or of another pass, say little.
        differing: in what else the pass differs from the others at its noise level, see `Passes`; likewise.
    """
    kinds = list(options.get("cond_or_uncond") or [0])
    uuids = options.get("uuids")
    if uuids is None or len(uuids) != len(kinds):
        uuids = [kinds[:place].count(kind) for place, kind in enumerate(kinds)]
    window, replaced = window_of(options), replaced_blocks(options)
    beside = (f", {window}" if window else "") + (
        f", {len(replaced)} block{'s' * (len(replaced) > 1)} replaced" if replaced else ""
    )
    beside += f", {differing}" if differing else ""
    names = []
    for key in zip(kinds, uuids, strict=True):
        if key not in known:
            kind, _ = key
            base = {0: "cond", 1: "uncond"}.get(kind, f"cond {kind}")
            taken = sum(name == base or name.startswith(f"{base} #") for name in known.values())
            known[key] = base if not taken else f"{base} #{taken + 1}"
        names.append(known[key] + beside)
    return names


def window_of(options: Mapping[str, Any]) -> str:
    """The context window of a forward pass, "frames 0 to 20" or "frames 0 to 60 by 3"; empty without one."""
    window = options.get("context_window")
    frames = list(getattr(window, "index_list", None) or ())
    if not frames:
        return ""
    anchor = getattr(window, "causal_anchor_index", None)
    stride = frames[1] - frames[0] if len(frames) > 1 else 1
    breaks = [place for place in range(1, len(frames)) if frames[place] - frames[place - 1] != stride]
    parts = [frames[a:b] for a, b in itertools.pairwise([0, *breaks, len(frames)])]
    words = " and ".join(f"{part[0]} to {part[-1]}" for part in parts) + (f" by {stride}" if stride != 1 else "")
    return f"frames {words}" + (f" behind {anchor}" if anchor is not None and anchor >= 0 else "")


def replaced_blocks(options: Mapping[str, Any]) -> Mapping[Any, Any]:
    """The transformer blocks that another node computes in its own way or skips, such as Skip Layer Guidance."""
    return (options.get("patches_replace") or {}).get("dit") or {}
