"""What each lever of a preset gives and costs: seconds and error after each one is added, measured in one process."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .calls import check_untouched, dtype_of
from .comparison import FrameMetrics, check_comparable, compare, mean_psnr, over_what_differs
from .compiled import included, uncompiled
from .errors import BadInput, mention, worded
from .machine import choose_device, choose_dtype, environment
from .model_facts import ModelFacts, inspect_model, inspect_pipeline
from .model_places import DEMOS
from .preset_request import said_of_preset
from .presets import LEVERS, check_beside, refusals, request_preset
from .progress import bars
from .prompts import in_words, prompts_with_seeds, unknown_note
from .request import Settings
from .run import Run, load, run, warm_up
from .schedulers import scheduler_words, stated
from .stages import BASE, Stage, stages
from .values import count
from .waterfall_checks import check_named

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from ..pipelines.presets import Preset

UNSURE = 0.1
"""A difference of less than this share is doubted: it must be more than what rounds differ by among themselves."""

Checker = Callable[[np.ndarray, str], bool]
"""Whether a video `[F, H, W, 3]` of bytes shows what a prompt says."""


@dataclass(frozen=True, eq=False)
class Row:
    """One stage, measured.

    Args:
        stage: what ran.
        steps, guidance_scale: of its calls.
        seconds: of whole calls of the pipeline, one list a round, one number a prompt.
        psnr: dB to the first row, one a prompt: the mean over the frames that differ; infinite where none does.
        right: whether each video shows what its prompt says; None where nothing checks it.
        forwards: passes of the transformer in a call, computed and skipped, the mean over the prompts.
        sample: frames of the first prompt, `[F, H, W, 3]` uint8.
        notes: of the run, in sentences.
        identical_frames: of all videos, those without any difference to the first row's.
        halved: of the passes that were computed, those with one branch of guidance instead of two, the mean.
    """

    stage: Stage
    steps: int
    guidance_scale: float | None
    seconds: tuple[tuple[float, ...], ...]
    psnr: tuple[float, ...]
    right: tuple[bool, ...] | None
    forwards: tuple[float, float]
    sample: np.ndarray
    notes: tuple[str, ...] = ()
    identical_frames: int = 0
    halved: float = 0

    @property
    def median(self) -> float:
        """Seconds of a call, the median over prompts and rounds."""
        return statistics.median(s for each in self.seconds for s in each)

    @property
    def spread(self) -> tuple[float, float]:
        """The least and the most of the rounds' medians: what the machine adds by itself."""
        medians = [statistics.median(each) for each in self.seconds]
        return min(medians), max(medians)

    @property
    def mean_psnr(self) -> float:
        """Mean over the prompts whose videos differ; infinite where none does, NaN where they cannot be compared."""
        return mean_psnr(self.psnr)

    @property
    def accuracy(self) -> float | None:
        """Share of the videos that show what their prompt says."""
        return None if self.right is None else statistics.fmean(self.right)


@dataclass(frozen=True, eq=False)
class Waterfall:
    """The rows of a preset, the plain base first.

    Args:
        preset: that was measured.
        rows: in the order in which its levers are added.
        prompts, seeds: of the videos.
        settings, environment: name -> value, shown as they are.
        notes: in sentences.
    """

    preset: Preset
    rows: tuple[Row, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<vidaccel waterfall, {len(self.rows)} rows. {self.in_words()}>"

    @property
    def leaves_out(self) -> bool:
        """Whether there are identical frames that a PSNR leaves out."""
        return any(row.identical_frames and math.isfinite(row.mean_psnr) for row in self.rows[1:])

    @property
    def halves(self) -> bool:
        """Whether any row has passes with one branch of guidance instead of two."""
        return any(row.halved for row in self.rows)

    def gain(self, row: Row) -> float:
        """How many times as fast as the first row."""
        return self.rows[0].median / row.median

    def gain_range(self, row: Row) -> tuple[float, float]:
        """The least and the most of that over the rounds."""
        first = [statistics.median(each) for each in self.rows[0].seconds]
        gains = [a / statistics.median(b) for a, b in zip(first, row.seconds, strict=True)]
        return min(gains), max(gains)

    def noise(self, row: Row) -> float:
        """By which share the rounds of the first row, or of this one, differ among themselves; NaN of one round."""
        if len(row.seconds) < 2:
            return math.nan
        return max((each.spread[1] - each.spread[0]) / each.median for each in (self.rows[0], row))

    def differs(self, row: Row) -> bool:
        """Whether a row takes another time than the first, as far as the rounds can tell.

        Not where each was the faster one in some round, nor where levers that leave passes out alone left none. Of a
        small difference (`UNSURE`), neither where the two are no further apart than the rounds of one of them, nor
        where they made the same videos in as many passes.
        """
        if self._cannot_gain(row):
            return False
        low, high = self.gain_range(row)
        if len(row.seconds) > 1 and low <= 1 <= high:
            return False
        return not self._small(row) or not (self._did_nothing(row) or abs(self.gain(row) - 1) <= self.noise(row))

    def _small(self, row: Row) -> bool:
        return abs(self.gain(row) - 1) < UNSURE

    def _cannot_gain(self, row: Row) -> bool:
        """Whether all of a row's levers act through passes that they leave out, and there were none."""
        return self._did_nothing(row) and set(row.stage.preset.levers()) <= {"cache", "guidance_cache"}

    def _did_nothing(self, row: Row) -> bool:
        as_many = (row.forwards, row.halved) == (self.rows[0].forwards, self.rows[0].halved)
        return as_many and all(value == math.inf for value in row.psnr)

    def in_words(self) -> str:
        """The gain of the whole preset in one sentence, with what it costs beside it."""
        first, last = self.rows[0], self.rows[-1]
        if self.differs(last):
            text = f"{self.preset.name}: {self.gain(last):.2f} times as fast as the plain base"
            text += f" ({last.median:.2f} s instead of {first.median:.2f} s a video"
            text += f"{self._doubt(last)})"
        elif self._did_nothing(last):
            text = f"{self.preset.name}: nothing gained, since no lever did anything: the same videos as the plain "
            return text + f"base makes, from as many passes ({last.median:.2f} s and {first.median:.2f} s a video)."
        else:
            text = f"{self.preset.name}: no gain that can be told from noise ({last.median:.2f} s a video with it and "
            text += f"{first.median:.2f} s without; rounds of the same differ by up to {self.noise(last):.0%})"
        if last.accuracy is not None:
            counts = (sum(row.right or ()) for row in (last, first))
            text += ", and {} instead of {} of {} videos show what their prompt says".format(*counts, len(self.prompts))
        elif math.isfinite(last.mean_psnr):
            text += f", at a PSNR of {last.mean_psnr:.1f} dB to it{over_what_differs(last.identical_frames)}"
        return text + "."

    def _doubt(self, row: Row) -> str:
        """What one round leaves open of a difference, in words; "" of several rounds."""
        if len(row.seconds) > 1:
            return ""
        if self._did_nothing(row):
            return "; the videos and the passes are the same, and more rounds tell whether the time is another"
        return "; a difference as small needs more rounds to be told from noise" if self._small(row) else ""

    def to_dict(self) -> dict[str, Any]:
        """Everything but pictures, in types that JSON knows (the same videos have a PSNR of null)."""
        rows = []
        for row in self.rows:
            finite = [value if math.isfinite(value) else None for value in row.psnr]
            rows.append(
                {
                    "lever": row.stage.name,
                    "what": row.stage.text,
                    "model": row.stage.model,
                    "steps": row.steps,
                    "guidance_scale": row.guidance_scale,
                    "median_seconds": row.median,
                    "seconds": [list(each) for each in row.seconds],
                    "times_as_fast": self.gain(row),
                    "times_as_fast_range": list(self.gain_range(row)),
                    "differs_from_base": self.differs(row),
                    "psnr_mean": row.mean_psnr if math.isfinite(row.mean_psnr) else None,
                    "psnr": finite,
                    "identical_frames": row.identical_frames,
                    "accuracy": row.accuracy,
                    "right": None if row.right is None else list(row.right),
                    "forwards_computed": row.forwards[0],
                    "forwards_skipped": row.forwards[1],
                    "forwards_halved": row.halved,
                    "notes": list(row.notes),
                }
            )
        return {
            "preset": self.preset.to_dict(),
            "gain": self.in_words(),
            "rows": rows,
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "settings": dict(self.settings),
            "environment": dict(self.environment),
            "notes": list(self.notes),
        }


def waterfall(
    model: str | Path | DiffusionPipeline | Callable[[], DiffusionPipeline] | None,
    preset: Preset | str | Path,
    prompts: str | Sequence[str],
    seeds: int | Sequence[int] = 0,
    *,
    rounds: int = 2,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    checker: Checker | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    offload: bool | str = False,
    tiling: bool = False,
    progress: bool = True,
) -> Waterfall:
    """Measure a preset lever by lever: seconds and error after each, against the plain base, in one process.

    All stages run in each round, so that what the machine does beside it shows as the spread of the rounds and does not
    fall on one stage. Each starts with a step that is not counted. Everything that can be checked is checked first.

    Args:
        model: the plain base: a name, folder or hub id, a pipeline, or what returns one; None for the preset's own.
        preset: a `Preset`, a file, or the name of one that comes with the package.
        prompts: one video each.
        seeds: of their noise: one each, or the first of as many.
        rounds: how often all is run; the spread needs two.
        frames, height, width: of the videos; None for each model's own.
        steps, guidance_scale: of the stages whose preset says nothing; None for the model's own.
        checker: tells whether a video shows what its prompt says; that of the built-in models for theirs when None.
        device, dtype, offload, tiling: see `vidaccel.generate`; of models that are loaded here.
        progress: show bars.

    Raises:
        BadInput: a request that cannot be met.
        GenerationError: the model made NaN or infinite values.
    """
    chosen = request_preset(preset)
    if chosen is None:
        raise BadInput("preset", "is needed", "Give what is to be measured.")
    texts, numbers = prompts_with_seeds(prompts, seeds)
    rounds = count("rounds", rounds)
    models = _Models(model, device, dtype, offload, tiling)
    with said_of_preset(LEVERS), refusals():
        plan = stages(chosen, models.first_name)
    if len(plan) == 1:
        raise BadInput("preset", f"has nothing to measure: {chosen.name} leaves the pipeline as it is")
    if not plan[0].model and models.given is None:
        raise BadInput("model", "is not known: the preset names none", f"Give {mention('model')}.")
    asked: dict[str, Any] = {"frames": frames, "height": height, "width": width}
    own = {"steps": steps, "guidance_scale": guidance_scale}
    requests = [_settings(stage, models.facts(stage.model), texts[0], asked, own) for stage in plan]
    check_comparable(requests[0].height, requests[0].width)
    for stage, settings in zip(plan, requests, strict=True):
        with said_of_preset(LEVERS):
            check_beside(stage.preset, models.facts(stage.model), settings, offload, models.device)
    models.check_named(plan[-1], requests[-1])
    checker = checker or _built_in_checker(models.facts(plan[0].model), texts)
    shown = bars(models.facts(plan[0].model).name) if progress else contextlib.nullcontext(lambda *_: None)
    with shown as tell:
        models.check_loaded(plan)
        measured = _measure(plan, requests, models, texts, numbers, rounds, checker, tell)
    first = requests[0]
    notes = [*filter(None, [unknown_note(models.facts(plan[0].model).name, *texts)])]
    if len({s.frames for s in requests}) > 1:
        counts = " and ".join(str(n) for n in dict.fromkeys(s.frames for s in requests))
        notes.append(f"The models make {counts} frames; PSNR is of those that all have.")
    notes += models.notes
    told = {
        "size": first.extent,
        "videos": in_words(texts, numbers, rounds),
        "scheduler": scheduler_words(stated(models.pipe(plan[0].model).scheduler)),
        "dtype": str(models.dtype(plan[0].model)).removeprefix("torch."),
    }
    return Waterfall(chosen, tuple(measured), texts, numbers, told, environment(models.device), tuple(notes))


class _Models:
    """The models of a waterfall, each loaded when it is needed first."""

    def __init__(self, given: Any, device: Any, dtype: Any, offload: bool | str, tiling: bool) -> None:
        if callable(given) and not hasattr(given, "components"):
            given = given()
        self.given = None if given is None or isinstance(given, str | Path) else given
        if self.given is not None:
            check_untouched(self.given)
        self.first_name = str(given) if isinstance(given, str | Path) else ""
        self.device = choose_device(device, offload) if self.given is None else self.given._execution_device
        self._dtype, self._offload, self._tiling = dtype, offload, tiling
        self._facts: dict[str, ModelFacts] = {}
        self._pipes: dict[str, Any] = {}
        self.notes: list[str] = []

    def _is_given(self, name: str) -> bool:
        return self.given is not None and (not self._facts or name in ("", next(iter(self._facts))))

    def facts(self, name: str) -> ModelFacts:
        """What a model is; the first that is asked for is the one that was given."""
        if name not in self._facts:
            self._facts[name] = inspect_pipeline(self.given) if self._is_given(name) else inspect_model(name)
        return self._facts[name]

    def dtype(self, name: str) -> Any:
        """Of a model."""
        if self._is_given(name):
            return dtype_of(self.given)
        return choose_dtype(self._dtype, self.device, name)

    def check_named(self, stage: Stage, settings: Settings) -> None:
        """Raise BadInput for what a preset names that is not there, or cannot be had here."""
        given, name = self.given if self._is_given(stage.model) else None, stage.model
        check_named(stage.preset, settings, self.facts(name), given, self.device, self.dtype(name))

    def check_loaded(self, plan: Sequence[Stage]) -> None:
        """Load all models, and raise BadInput where the levers cannot be put to work in theirs."""
        from ..pipelines.presets.checks import check_preset

        last = {stage.model: stage.preset for stage in plan}
        for name, preset in last.items():
            pipe = self.pipe(name)
            with said_of_preset(LEVERS), refusals():
                check_preset(pipe, preset, self.facts(name).location)

    def pipe(self, name: str) -> Any:
        """A model, loaded."""
        if name not in self._pipes:
            if self._is_given(name):
                self._pipes[name] = self.given
            else:
                self._pipes[name] = load(
                    self.facts(name), self.dtype(name), self.device, offload=self._offload, tiling=self._tiling
                )
        return self._pipes[name]


def _settings(stage: Stage, facts: ModelFacts, prompt: str, asked: dict[str, Any], own: dict[str, Any]) -> Settings:
    steps, scale = stage.preset.num_inference_steps, stage.preset.guidance_scale
    wanted = Settings(
        prompt,
        **asked,
        steps=own["steps"] if steps is None else steps,
        guidance_scale=own["guidance_scale"] if scale is None else scale,
    )
    return wanted.checked(facts)


def _built_in_checker(facts: ModelFacts, prompts: Sequence[str]) -> Checker | None:
    """That of the built-in models, where all prompts are of their world."""
    from ..demo.checker import check
    from ..demo.world import parse_caption

    if facts.name not in DEMOS:
        return None
    try:
        for prompt in prompts:
            parse_caption(prompt)
    except ValueError:
        return None
    return lambda frames, prompt: check(frames).agrees_with(prompt)["all"]


def _measure(
    plan: Sequence[Stage],
    requests: Sequence[Settings],
    models: _Models,
    prompts: Sequence[str],
    seeds: Sequence[int],
    rounds: int,
    checker: Checker | None,
    tell: Callable[..., None],
) -> Iterator[Row]:
    from ..pipelines.presets.account import mean_count

    seconds: list[list[tuple[float, ...]]] = [[] for _ in plan]
    late: list[list[str]] = [[] for _ in plan]  # what was compiled all the same, in runs that count
    rows: list[Row] = []
    reference: list[np.ndarray] = []
    for number in range(rounds):
        for place, (stage, settings) in enumerate(zip(plan, requests, strict=True)):
            name = stage.name if stage.name == BASE else f"+ {stage.name}"
            tell(name, "warm-up", number * len(prompts), rounds * len(prompts))
            with _at_work(models, stage, settings) as (pipe, handle):
                taken: list[float] = []
                cut: list[str] = []
                videos, runs = [], []
                for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
                    request = replace(settings, prompt=prompt, seed=seed)
                    made, graphs = uncompiled(functools.partial(_counted, pipe, handle, request, first=not taken))
                    late[place] += filter(None, [included(graphs, made.seconds)])
                    taken.append(made.seconds)
                    account = handle.report()
                    runs.append(account.last())  # a cache that goes by content skips more of some
                    cut += map(worded, made.cut)
                    if not number:
                        videos.append((made.frames * 255).round().astype(np.uint8))
                    tell(name, f"round {number + 1}", number * len(prompts) + i + 1, rounds * len(prompts))
            seconds[place].append(tuple(taken))
            if number:
                continue
            reference = reference or videos
            near = [_metrics(a, b) for a, b in zip(reference, videos, strict=True)]
            rows.append(
                Row(
                    stage,
                    settings.steps,
                    settings.guidance_scale,
                    (),
                    tuple(math.nan if each is None else each.mean_psnr for each in near),
                    None if checker is None else tuple(checker(v, p) for v, p in zip(videos, prompts, strict=True)),
                    (mean_count(runs, "computed"), mean_count(runs, "skipped")),
                    videos[0],
                    (*account.notes, *dict.fromkeys(cut)),
                    sum(each.identical_frames for each in near if each is not None),
                    mean_count(runs, "halved"),
                )
            )
    return (
        replace(row, seconds=tuple(each), notes=(*row.notes, *told))
        for row, each, told in zip(rows, seconds, late, strict=True)
    )


def _counted(pipe: Any, handle: Any, request: Settings, first: bool) -> Run:
    """A run of a stage; a stage's report begins with the first of them that compiles nothing."""
    if first:
        handle.reset()
    return run(pipe, request)


@contextlib.contextmanager
def _at_work(models: _Models, stage: Stage, settings: Settings) -> Iterator[tuple[Any, Any]]:
    """The pipeline of a stage with its levers, after a step that is not counted."""
    from ..pipelines.presets import apply

    pipe = models.pipe(stage.model)
    with (
        said_of_preset(LEVERS),
        refusals(),
        apply(pipe, stage.preset, base=models.facts(stage.model).location) as handle,
    ):
        warm_up(pipe, settings, None, handle)
        yield pipe, handle


def _metrics(reference: np.ndarray, other: np.ndarray) -> FrameMetrics | None:
    """Of the frames that both have; None for another size."""
    frames = min(len(reference), len(other))
    if reference.shape[1:] != other.shape[1:]:
        return None
    return compare(reference[:frames], other[:frames])
