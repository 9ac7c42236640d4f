"""Load a pipeline, run it, dense or accelerated, and time it."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .calls import call_arguments, dtype_of, frames_of, guided, parts_of, row_of, sound_of, stepped
from .compiled import counted, included
from .errors import BadInput, worded
from .levers.presets import refusals
from .machine import synchronise
from .media.sound import Sound
from .models.facts import ModelFacts
from .models.inspected import check_packages
from .models.scheduler_noise import seeded
from .report.comparison import GeneratedVideo
from .requests.pipeline_options import refusals as refused_options
from .requests.settings import DEFAULT_FPS, Settings
from .requests.text_limit import reading

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from diffusers import DiffusionPipeline

    from ..attention.account.records import RunReport
    from ..attention.methods.base import Method
    from ..attention.schedule import DenseSchedule
    from ..pipelines.presets import Account, Applied, Preset
    from .crew import Crew
    from .job import Job

StepCallback = Callable[[int, int, Any], None]
"""Called with (steps done, steps of the run, latents after the step) at the end of every denoising step; may raise."""
NoteCallback = Callable[[str], None]
"""Called with what a user should know while a run is at work, to be `worded`."""
StageCallback = Callable[[str, str, int, int], None]
"""Called with (name of the run, "warm-up", "steps" or "decoding", steps done, steps of the run)."""


class GenerationError(RuntimeError):
    """The model ran and made nothing usable."""


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a pipeline.

    Args:
        frames: `[F, H, W, 3]` float32 in [0, 1]; None when nothing was decoded.
        seconds: wall time of the whole call: text encoding, denoising and decoding.
        step_ends: when each step ended, in seconds from the start.
        report: what attention did; None for the untouched pipeline.
        notes: what was done to the pictures or the video that it starts from, in words.
        cut: what of the prompts no text encoder read, in words; to be `worded`.
        sound: of models that make one.
        account: of a run with a cache, layers in 8 bits or another scheduler: what each step was.
    """

    frames: np.ndarray | None
    seconds: float
    step_ends: tuple[float, ...]
    report: RunReport | None
    notes: tuple[str, ...]
    sound: Sound | None = None
    account: Account | None = None
    cut: tuple[str, ...] = ()

    @property
    def step_seconds(self) -> float | None:
        """Median time from one step's end to the next; None with a single step."""
        between = [b - a for a, b in itertools.pairwise(self.step_ends)]
        return statistics.median(between) if between else None


def load(
    facts: ModelFacts,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    offload: bool | str = False,
    tiling: bool = False,
) -> DiffusionPipeline:
    """Load the weights and place them; see `pipelines.loading.load_pipeline`.

    Raises:
        BadInput: weights that are missing or unreadable, or a package that the pipeline needs is not installed.
    """
    from safetensors import SafetensorError

    from ..pipelines.errors import first_line
    from ..pipelines.files.missing_weights import missing_weights
    from ..pipelines.loading import load_pipeline

    check_packages(facts)
    if lacking := missing_weights(facts.location):
        raise BadInput("model", f"it is not whole: {lacking}", "Download it again.", value=facts.name)
    try:
        return load_pipeline(
            facts.location,
            dtype,
            device,
            pipeline_class=facts.pipeline_class,
            offload=offload,
            tiling=tiling or facts.row.tiled,
            autoencoder_dtype=dtype if facts.row.follows else None,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise BadInput("model", f"it cannot be loaded: {first_line(error).rstrip('.')}", value=facts.name) from error


def run(
    pipe: DiffusionPipeline,
    settings: Settings,
    method: Method | None = None,
    *,
    backend: str = "auto",
    schedule: DenseSchedule | None = None,
    measure_error: int = 0,
    precision: str | None = None,
    adapter: Sequence[Path] = (),
    base: str | None = None,
    beside: Preset | None = None,
    on_step: StepCallback | None = None,
    on_note: NoteCallback | None = None,
    decode: bool = True,
    crew: Crew | None = None,
) -> Run:
    """Run a pipeline once, dense (`method=None`, the pipeline as it is) or accelerated.

    The initial noise comes from a CPU generator with the seed, so it is the same for every method and device. The
    noise that a scheduler adds in its steps follows from the seed, too, and is the same for every method and process.

    Args:
        pipe: the pipeline.
        settings: checked.
        method, backend, schedule, measure_error, precision, adapter, base: see `accelerate`.
        beside: a cache, layers in 8 bits, compiled blocks and a scheduler, see `presets.beside`.
        on_step: told of every step.
        on_note: told what of the prompts is cut off, after the first step.
        decode: make frames of the latents.
        crew: of the processes that share the run; None for one alone.

    Raises:
        GenerationError: the model made NaN or infinite values.
        BadInput: the model was not trained for SLA or VSA as it is asked for.
    """
    from ..pipelines import accelerate
    from ..pipelines.acceleration.sla_weights import SLAError
    from ..pipelines.acceleration.vsa_gates import VSAError
    from ..pipelines.presets import apply

    if beside is not None:
        if method is not None:
            method = method if schedule is None else replace(method, schedule=schedule)
            sla = adapter if method.name == "sla" else ()
            beside = beside.replace(method=method, backend=backend, precision=precision, sla=sla)
        rows = 0 if beside.method is None else measure_error
        with refusals(), apply(pipe, beside, base=base, measure_error=rows) as applied:
            made = _call(pipe, settings, on_step, on_note, decode, crew)
            account = applied.report().last()
            return replace(made, report=account.attention, account=account)
    if method is None:
        return _call(pipe, settings, on_step, on_note, decode, crew)
    options: dict[str, Any] = {"backend": backend, "schedule": schedule, "measure_error": measure_error}
    options["precision"] = precision
    try:
        handle = accelerate(pipe, method, **options, adapter=adapter if method.name == "sla" else (), base=base)
    except (SLAError, VSAError) as error:
        raise BadInput("method", str(error).rstrip("."), value=method.name) from error
    with handle:
        made = _call(pipe, settings, on_step, on_note, decode, crew)
        return replace(made, report=handle.report().last())


@contextlib.contextmanager
def _without_bars(pipe: DiffusionPipeline) -> Iterator[None]:
    """Without the pipeline's own bars, also of one that the user loaded: who wants progress has `on_step`."""
    before = pipe.__dict__.get("_progress_bar_config")
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before


def _call(
    pipe: DiffusionPipeline,
    settings: Settings,
    on_step: StepCallback | None,
    on_note: NoteCallback | None,
    decode: bool,
    crew: Crew | None,
) -> Run:
    import torch

    from ..pipelines.few_steps.start import scaled_start

    row = row_of(pipe)
    parts = parts_of(pipe, row, settings)
    ends: list[float] = []

    def step_ended(latents: Any) -> None:
        synchronise(device)
        ends.append(time.perf_counter() - start)
        for note in heard.notes(settings) if on_note is not None and len(ends) == 1 else ():
            on_note(note)
        if on_step is not None:
            on_step(len(ends), max(len(ends), parts * getattr(pipe, "num_timesteps", settings.steps)), latents)

    device = pipe._execution_device
    synchronise(device)
    start = time.perf_counter()
    with (
        refused_options(settings.pipeline_options),
        guided(pipe, row, settings),
        scaled_start(pipe),
        reading(pipe) as heard,
        stepped(pipe, step_ended) as told,
        _without_bars(pipe),
        seeded(device, settings.seed),
        contextlib.nullcontext() if crew is None else crew.guidance(pipe) as shared,
    ):
        result = pipe(
            **call_arguments(pipe, row, settings),
            **told,
            generator=torch.Generator(device if row.device_noise else "cpu").manual_seed(settings.seed),
            output_type="np" if decode else "latent",
        )
    synchronise(device)
    seconds, cut = time.perf_counter() - start, tuple(heard.notes(settings))
    notes = settings.notes
    if crew is not None:
        notes += (f"{'; '.join([crew.sharing.in_words(), *shared])}.",)
    if not decode:
        return Run(None, seconds, tuple(ends), None, notes, cut=cut)
    frames = frames_of(row, settings, result)
    _check_finite(pipe, frames, "a video")
    sound = sound_of(pipe, row, result)
    if sound is not None:
        _check_finite(pipe, sound.samples, "a sound")
    if len(frames) != settings.frames:
        notes = (*notes, f"The pipeline made {len(frames)} frames instead of {settings.frames}.")
    return Run(frames, seconds, tuple(ends), None, notes, sound, cut=cut)


def _check_finite(pipe: DiffusionPipeline, values: np.ndarray, what: str) -> None:
    if np.isfinite(values).all():
        return
    dtype = str(dtype_of(pipe))
    others = " or ".join(name for name in ("bfloat16", "float32") if dtype != f"torch.{name}")
    raise GenerationError(
        f"the model made NaN or infinite values instead of {what} in {dtype}: another dtype may help ({others})."
    )


def make_video(
    pipe: DiffusionPipeline,
    settings: Settings,
    name: str,
    method: Method | None,
    *,
    on_step: StepCallback | None = None,
    **options: Any,
) -> GeneratedVideo:
    """Run a pipeline once; the video as bytes, and its times. `options` are those of `run`."""
    made, graphs = counted(lambda: run(pipe, settings, method, on_step=on_step, **options))
    of_account = () if made.account is None else made.account.own_notes
    if told := included(graphs, made.seconds):
        of_account = (*of_account, told)
    return GeneratedVideo(
        name=name,
        frames=(made.frames * 255).round().astype(np.uint8),
        seconds=made.seconds,
        report=made.report,
        step_seconds=made.step_seconds,
        decode_seconds=made.seconds - made.step_ends[-1],
        fps=settings.fps or DEFAULT_FPS,
        notes=(*made.notes, *map(worded, made.cut), *(f"{name}: {note}." for note in of_account)),
        sound=made.sound,
        account=made.account,
    )


def warm_up(
    pipe: DiffusionPipeline, settings: Settings, method: Method | None, applied: Applied | None = None, **options: Any
) -> float:
    """A step (or as few as the pipeline makes) that is not counted: compilation and first use stay out of a comparison.

    An accelerated warm-up is sparse in every layer, since a dense first step would compile nothing; but a
    method that is trained has the schedule of its training. `applied` is the handle of a preset that is at work,
    `options` those of `run`.

    Returns:
        What it took, in seconds.
    """
    from ..attention.schedule import DenseSchedule
    from ..pipelines.presets.checks import chosen_scheduler

    scheduler = pipe.scheduler
    if (beside := options.get("beside")) is not None and beside.scheduler is not None:
        with refusals():
            scheduler = chosen_scheduler(pipe, beside)
    least = getattr(scheduler, "fixed_steps", row_of(pipe).least_steps)  # of a model that was distilled to them
    single = replace(settings, steps=least, strength=None if settings.video is None else 1.0)
    if method is None:
        with contextlib.nullcontext() if applied is None else applied.warming_up():
            crew = options.get("crew")
            return run(pipe, single, **options, decode=crew is None or crew.process.first).seconds
    schedule = None if method.needs_weights else DenseSchedule()
    return run(pipe, single, method, schedule=schedule, decode=False, **options).seconds


def make_videos(
    job: Job,
    pipe: DiffusionPipeline,
    *,
    warm: bool = False,
    on_stage: StageCallback | None = None,
    on_note: NoteCallback | None = None,
    crew: Crew | None = None,
) -> Iterator[GeneratedVideo]:
    """Every video of a job, each as soon as it is there, so that a stop in a later run loses nothing.

    Of several processes, all but the first make none: what they compute is in the first one's.

    Args:
        job: what to run.
        pipe: loaded for it.
        warm: an uncounted step before each run.
        on_stage: told of what happens.
        on_note, crew: see `run`.
    """
    tell = on_stage or (lambda name, stage, done, total: None)
    options: dict[str, Any] = {
        "backend": job.backend,
        "precision": job.precision,
        "adapter": [adapter.path for adapter in job.sla],
        "base": None if job.pipe is not None else job.facts.location,
        "crew": crew,
    }
    for name, method in job.methods.items():

        def stepped(done: int, total: int, _latents: Any, name: str = name) -> None:
            tell(name, "steps" if done < total else "decoding", done, total)

        plain = job.compare and name == next(iter(job.methods))  # the reference is the pipeline as it is
        options["beside"] = None if plain else job.beside
        warm_seconds = None
        if warm:
            tell(name, "warm-up", 0, job.settings.steps)
            warm_seconds = warm_up(pipe, job.settings, method, **options)
        tell(name, "steps", 0, job.settings.steps)
        more: dict[str, Any] = {"measure_error": job.measure_error, "on_step": stepped, "on_note": on_note}
        if not job.process.first:
            run(pipe, job.settings, method, **options, **more, decode=False)
            continue
        video = make_video(pipe, job.settings, name, method, **options, **more)
        yield replace(video, warm_up_seconds=warm_seconds)
