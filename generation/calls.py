"""How a pipeline is called for a request, as its row says: its arguments, its guidance, its steps, its result."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import BadInput
from .media.sound import Sound
from .rows import PipelineRow, find_row

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from .requests.settings import Settings

StepEnd = Callable[[Any], None]
"""Called with the latents at the end of each step."""


def row_of(pipe: DiffusionPipeline) -> PipelineRow:
    """The row of a loaded pipeline."""
    from ..pipelines.acceleration.families import unwrap

    part = unwrap(getattr(pipe, "transformer", None) or getattr(pipe, "transformer_2", None))
    row = find_row(type(pipe).__name__, getattr(part, "config", None), dict(pipe.config))
    if row is None:
        raise TypeError(f"{type(pipe).__name__} has no row in generation/rows.")
    return row


def dtype_of(pipe: DiffusionPipeline) -> torch.dtype:
    """In what a loaded pipeline runs; one of two transformers may be left out."""
    return (pipe.transformer or pipe.transformer_2).dtype


def check_untouched(pipe: DiffusionPipeline) -> None:
    """Raise BadInput for a loaded pipeline in which a preset or sparse attention is at work: its dense run would not be
    one.
    """
    from ..pipelines.hooks.undo import sparse_at_work

    if found := sparse_at_work(pipe):
        problem = f"{found} is at work in it already, so that no run of it would be dense"
        fix = "Call remove() on its handle, or vidaccel.restore(pipe), and name the method or the preset here."
        raise BadInput("model", problem, fix, value=type(pipe).__name__)


def as_class(pipe: DiffusionPipeline, name: str) -> DiffusionPipeline:
    """A loaded pipeline as one of another class that takes the same parts, where and as they are."""
    from ..pipelines.loading import as_video_to_video, find_class

    if name == type(pipe).__name__:
        return pipe
    if name == "WanVideoToVideoPipeline":
        return as_video_to_video(pipe)
    cls = find_class(name)
    wanted = [parameter for parameter in inspect.signature(cls.__init__).parameters if parameter != "self"]
    parts = {part: value for part in wanted if (value := getattr(pipe, part, pipe.config.get(part))) is not None}
    made = cls(**parts)
    made.register_to_config(_name_or_path=pipe.name_or_path)
    made.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return made


def call_arguments(pipe: DiffusionPipeline, row: PipelineRow, settings: Settings) -> dict[str, Any]:
    """What the pipeline is called with, but for guidance by a guider, noise, callback and output.

    Args:
        pipe: the pipeline.
        row: of it.
        settings: checked.
    """
    taken = inspect.signature(pipe.__call__).parameters
    arguments: dict[str, Any] = {"prompt": settings.prompt, **row.steps(settings.steps)}
    if row.negative_prompt and (settings.negative_prompt or row.no_negative_prompt is not None):
        arguments["negative_prompt"] = settings.negative_prompt or row.no_negative_prompt
    if "num_frames" in taken:  # a video-to-video pipeline makes as many frames as it is given
        factor = _frame_factor(pipe, row)
        arguments["num_frames"] = row.frames.asked(settings.frames, factor)
    if "height" in taken:  # some take the size of their picture
        arguments |= {"height": settings.height, "width": settings.width}
    if row.guidance not in ("", "guider"):
        arguments[row.guidance] = settings.guidance_scale
    if row.rate:
        arguments[row.rate] = settings.fps or row.fps
    if row.strength and settings.strength is not None:
        arguments[row.strength] = settings.strength
    if row.inputs is not None:
        arguments |= row.inputs(settings)
    else:
        for field in settings.given:
            is_video = field.endswith("video")
            arguments[row.takes[field]] = settings.pictures(field) if is_video else getattr(settings, field)
    return arguments | row.always(pipe, settings) | dict(settings.pipeline_options)


def parts_of(pipe: DiffusionPipeline, row: PipelineRow, settings: Settings) -> int:
    """How many times the pipeline goes through all steps, for one part of the video after the other."""
    return row.parts(settings.frames, _frame_factor(pipe, row))


def _frame_factor(pipe: DiffusionPipeline, row: PipelineRow) -> int:
    vae = getattr(pipe, "vae", None)
    return row.factors(getattr(vae, "config", {}) or {})[0]


@contextlib.contextmanager
def guided(pipe: DiffusionPipeline, row: PipelineRow, settings: Settings) -> Iterator[None]:
    """A pipeline whose guidance is a part of it has one of the request's scale while this lasts."""
    before = getattr(pipe, "guider", None) if row.guidance == "guider" else None
    if before is None or settings.guidance_scale is None:
        yield
        return
    pipe.guider = before.new(guidance_scale=settings.guidance_scale)
    try:
        yield
    finally:
        pipe.guider = before


@contextlib.contextmanager
def stepped(pipe: DiffusionPipeline, on_step: StepEnd) -> Iterator[dict[str, Any]]:
    """Arguments of a call that tell of every step.

    A pipeline without a callback is heard through its scheduler, whose `step` is the request's while this lasts.
    """
    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:

        def step_ended(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(tensors["latents"])
            return {}

        yield {"callback_on_step_end": step_ended}
        return
    scheduler = pipe.scheduler
    step = scheduler.step

    def told(*args: Any, **kwargs: Any) -> Any:
        made = step(*args, **kwargs)
        on_step(made[0])
        return made

    scheduler.step = told
    try:
        yield {}
    finally:
        del scheduler.step


def frames_of(row: PipelineRow, settings: Settings, result: Any) -> np.ndarray:
    """The frames of a result, `[F, H, W, 3]` float32 in [0, 1], without those of a video before them."""
    video = getattr(result, row.result)
    frames = np.asarray(video if row.single else video[0], np.float32)
    return frames[len(settings.video) :] if row.repeats_video else frames


def sound_of(pipe: DiffusionPipeline, row: PipelineRow, result: Any) -> Sound | None:
    """The sound of a result; None where it has none."""
    found = None if row.audio is None else row.audio(pipe, result)
    return found and Sound.of(*found)
