"""The guidance cache in ComfyUI's native models: the pass of the negative prompt is made in some steps only.

A wrapper around ComfyUI's `calc_cond_batch` leaves it out and gives what stands for it, so that whatever computes with
both results gets both: any formula of guidance, any sampler. Guiders with other branches than two are let through.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ...attention import StepInfo
from ...pipelines.guidance_cache.differences import Differences
from ...pipelines.guidance_cache.settings import GuidanceCache
from ..report.cache_log import CacheLog
from ..report.wording import InputError
from .caches import GUIDANCE, asked_of, changed, put_in
from .geometry import diffusion_model_of
from .models import find_geometry
from .passes import Passes
from .sampling import step_of, window_of

logger = logging.getLogger(__name__)


def guidance_log() -> CacheLog:
    """For a report of one clone's cache."""
    return CacheLog(
        "Guidance Cache", "no pass of the negative prompt was left out; with a cfg of 1 there is none to make.", logger
    )


def cache_guidance(model: Any, settings: GuidanceCache, log: CacheLog | None = None) -> Any:
    """A clone of a MODEL with a guidance cache; the MODEL itself stays as it is.

    Args:
        model: ComfyUI's ModelPatcher. settings: of the cache.
        log: of this clone alone, which is told what was done, for a report.

    Raises:
        InputError: the MODEL has one already, a forecast cache or one of ComfyUI's, or guidance in one pass.
    """
    from comfy.patcher_extension import WrappersMP

    from .guidance import KEY as ONE_PASS

    diffusion_model_of(model)
    if model.get_wrappers(WrappersMP.OUTER_SAMPLE, ONE_PASS):
        raise InputError("this MODEL is guidance-free: its steps have one pass, and there is none to leave out.")
    return put_in(model, GUIDANCE, _Cached(settings, log or guidance_log()))


def mixes_prompts(model: Any, options: Mapping[str, Any]) -> bool:
    """Whether another node may compute with both prompts within the model, so that neither pass is there alone.

    It does so where it changes what attention gives. Many models never call such a patch; of one that is not known, it
    counts.

    Args:
        model: ComfyUI's BaseModel. options: of the model.
    """
    patches = (options.get("transformer_options") or {}).get("patches") or {}
    if not any(functions and re.fullmatch(r"attn\d_output_patch", name) for name, functions in patches.items()):
        return False
    geometry = find_geometry(model.diffusion_model)
    return geometry is None or geometry.patches_output


class _Place(NamedTuple):
    """What differences are of: the two passes of one context window."""

    window: str
    asked: tuple[str, ...]


class _Cached:
    """One clone's: the differences of the sampling that runs, of each place.

    A difference goes on from the last step. So what a step has not seen is forgotten in the next one: context windows
    that move, conditions that are not asked for any more, and what was before steps with one pass.
    """

    def __init__(self, settings: GuidanceCache, log: CacheLog) -> None:
        self._settings, self._log = settings, log
        self._forget()

    def begin(self, queued: str | None = None) -> None:
        """A sampler starts, for an entry of ComfyUI's queue."""
        self._log.begin(queued)
        self._forget()

    def _forget(self) -> None:
        self._kept: dict[_Place, Differences] = {}
        self._seen: set[_Place] = set()  # in the step that runs
        self._asked: set[tuple[str, ...]] = set()
        self._step = -1
        self._finished = False
        self._moved = False  # context windows came and went
        self._made = self._extrapolated = 0
        self._apart = 0  # calls that ask for other passes than the two of guidance, and for these not in one call
        self._asks_for_one = False  # the step that runs: for the positive prompt alone, or for both
        self._mixed = False  # another node mixes both prompts within the model
        self._passes = Passes()

    def finish(self) -> None:
        """A sampler has done all of its steps, and was not interrupted."""
        self._finished = True

    def end(self) -> None:
        """A sampler ends, also by an interruption."""
        if self._extrapolated:
            count = self._made + self._extrapolated
            self._log.tell(logging.INFO, f"{self._made} of {count} passes of the negative prompt were made.")
        elif self._apart > self._made and self._finished:
            self._log.tell(
                logging.WARNING,
                "no pass of the negative prompt was left out: the guider or another node asks for its passes apart, or "
                "for other ones than two, which stay as they are.",
            )
        elif self._made and self._finished:  # of a sampling that was interrupted, that tells nothing
            fix = "make more steps, or lower first_percent"
            if self._mixed:
                fix = (
                    "another node changes attention where both prompts are in one batch (as Normalized Attention "
                    "Guidance does), which a pass left out would switch off. Leave out that node, or this one"
                )
            elif self._moved:
                fix = "context windows moved from step to step, which leaves no difference to go on: take a static one"
            elif 2 * len(self._asked) > max(2, self._made):
                fix = changed(len(self._asked))
            self._log.tell(logging.WARNING, f"all {self._made} passes of the negative prompt were made: {fix}.")
        self._forget()

    def _enter(self, number: int) -> None:
        """A pass of a step begins."""
        if number != self._step:
            windows = {place.window for place in self._seen}
            self._moved |= any(place.window and place.window not in windows for place in self._kept)
            self._kept = {place: kept for place, kept in self._kept.items() if place in self._seen}
            self._step, self._seen, self._asks_for_one = number, set(), False

    def _is_apart(self, conds: list[Any]) -> bool:
        """Whether a call without the two passes of guidance has some of another guider: not the positive one alone, as
        with a cfg of 1, nor a further one of a node that guides beside these."""
        if len(conds) == 2:
            self._asks_for_one |= conds[0] is not None
            return conds[0] is None
        return len(conds) > 2 or not self._asks_for_one

    def conditions(
        self,
        executor: Any,
        model: Any,
        conds: list[Any],
        x: torch.Tensor,
        timestep: torch.Tensor,
        options: dict[str, Any],
        *more: Any,
    ) -> list[torch.Tensor]:
        """The CALC_COND_BATCH wrapper: what the model makes of each list of conditions, shaped as `x`."""
        inner = options.get("transformer_options") or {}
        levels = inner.get("sample_sigmas")
        if levels is None:
            return executor(model, conds, x, timestep, options, *more)
        sigma = float(timestep.flatten()[0])
        number, count = step_of(sigma, levels.tolist())
        self._enter(number)
        beside = self._passes.beside(inner, sigma)
        if len(conds) != 2 or any(cond is None for cond in conds):
            self._apart += self._is_apart(conds)
            return executor(model, conds, x, timestep, options, *more)
        self._asks_for_one = True
        if mixes_prompts(model, options):
            self._mixed = True
            self._made += sigma > 0
            return executor(model, conds, x, timestep, options, *more)
        step = StepInfo(0, number, count)
        asked = tuple(asked_of(model, cond, timestep, options, beside) for cond in conds)
        place = _Place(window_of(inner), asked)
        self._seen.add(place)
        self._asked.add(place.asked)
        differences = self._kept.setdefault(place, Differences(self._settings))
        if sigma <= 0 or differences.wanted(step, [x.shape]):
            out = executor(model, conds, x, timestep, options, *more)
            if sigma > 0:
                self._made += 1
                positive, negative = (made / sigma for made in out)
                differences.add(step, [positive], [negative])
            return out
        self._extrapolated += 1
        # What it makes is an image, which is what it takes off the noise times the noise level.
        positive, _ = executor(model, [conds[0], None], x, timestep, options, *more)
        (stand_in,) = differences.second(step, [positive / sigma])
        return [positive, stand_in * sigma]
