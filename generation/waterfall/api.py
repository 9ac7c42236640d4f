"""What each lever of a preset gives and costs: seconds and error after each one is added, measured in one process."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..compiled import included, uncompiled
from ..errors import BadInput, mention, worded
from ..levers.presets import LEVERS, check_beside, refusals, request_preset
from ..machine import environment
from ..models.facts import ModelFacts
from ..models.places import DEMOS
from ..models.schedulers import scheduler_words, stated
from ..progress import bars
from ..report.comparison import FrameMetrics, check_comparable, compare
from ..requests.filled import said_of_preset
from ..requests.prompts import in_words, prompts_with_seeds, unknown_note
from ..requests.settings import Settings
from ..requests.values import count
from ..run import Run, run, warm_up
from .account import Row, Waterfall
from .models import Models
from .stages import BASE, Stage, stages

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from ...pipelines.presets import Preset

Checker = Callable[[np.ndarray, str], bool]
"""Whether a video `[F, H, W, 3]` of bytes shows what a prompt says."""


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
    models = Models(model, device, dtype, offload, tiling)
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
    from ...demo.checker import check
    from ...demo.world import parse_caption

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
    models: Models,
    prompts: Sequence[str],
    seeds: Sequence[int],
    rounds: int,
    checker: Checker | None,
    tell: Callable[..., None],
) -> Iterator[Row]:
    from ...pipelines.presets.account import mean_count

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
def _at_work(models: Models, stage: Stage, settings: Settings) -> Iterator[tuple[Any, Any]]:
    """The pipeline of a stage with its levers, after a step that is not counted."""
    from ...pipelines.presets import apply

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
