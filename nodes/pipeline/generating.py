"""Making a video with a pipeline of diffusers under ComfyUI.

As in `pipelines`, no ComfyUI module is imported here, and diffusers inside functions.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...generation.calls import dtype_of
from ...generation.errors import BadInput
from ...generation.levers.guidance import check_guidance, guidance_adapters, guided_by, own_adapters, suited
from ...generation.levers.length import check_trained, chosen_riflex, roped
from ...generation.levers.presets import (
    check_beside,
    check_guidance_cache,
    check_scheduler,
    measured_note,
    other_model_note,
)
from ...generation.levers.run_methods import as_given
from ...generation.requests.filled import Filled, filled, said_of_preset
from ...generation.requests.settings import Settings
from ...generation.requests.sparse import Sparse
from ...generation.run import Run, StepCallback
from ...generation.run import run as run_pipeline
from ..report.news import GenerationReport, News
from ..report.wording import chosen_precision, plain, plain_messages
from .inputs import Clip, read
from .pipelines import VideoPipeline

if TYPE_CHECKING:
    import torch

    from ...attention import Method, VideoLayout
    from ...generation.media.sound import Sound
    from ...pipelines.guidance_free.adapter_file import GuidanceFreeAdapter
    from .acceleration import Acceleration


@dataclass(frozen=True, eq=False)
class Generation:
    """What a run made.

    Args:
        frames: `[F, H, W, 3]` float32 on the CPU, in [0, 1], as ComfyUI's IMAGE.
        report: for the report node.
        fps: frames per second, those asked for or the model's.
        audio: as ComfyUI's AUDIO, of models that make sound: "waveform" `[1, C, S]` and "sample_rate", no longer than
            the frames. None for others.
    """

    frames: torch.Tensor
    report: GenerationReport
    fps: float
    audio: dict[str, Any] | None = None


def generate(
    pipeline: VideoPipeline,
    settings: Settings,
    *,
    image: torch.Tensor | None = None,
    last_image: torch.Tensor | None = None,
    video: Clip | None = None,
    face_video: Clip | None = None,
    on_step: StepCallback,
) -> Generation:
    """Make a video. The initial noise comes from a CPU generator, so a seed gives the same one on every device.

    Args:
        pipeline: what to run.
        settings: None in a field takes the model's own value.
        image, last_image: `[1, H, W, 3]` in [0, 1], the first and the last frame, for an image-to-video pipeline;
            fitted to the video's size.
        video: to start from; asked for the frames that are used. A pipeline that takes none then runs as the one that
            does, with the same weights, where there is one: Wan's as video to video, for example.
        face_video: likewise, for Wan Animate alone.
        on_step: called at the end of every step; may raise to stop the run.

    Raises:
        InputError: the model cannot do this size, length, picture or video; nothing has run then.
        GenerationError: the model made NaN or infinite values.
    """
    with plain_messages():
        settings = replace(settings, image=image, last_image=last_image, video=video, face_video=face_video)
        pipeline = pipeline.starting_from(settings.given)
        facts, device, dtype = pipeline.facts, pipeline.residency.device, dtype_of(pipeline.pipe)
        none: dict[str, Any] = {"lora": (), "guidance_free": (), "sla": ()}  # beside those of the preset
        request = filled(pipeline.preset, {}, settings, Sparse(), none)
        with said_of_preset(request.of_preset):
            settings = _checked(pipeline, request)
        layout = settings.layout(facts)
        acceleration, limit = pipeline.acceleration, ""
        if acceleration is not None and facts.only_dense:
            raise BadInput("model", facts.only_dense, "Leave Accelerate Pipeline out.")
        if acceleration is not None:
            acceleration, limit = acceleration.on(facts, device, dtype)
            pipeline = replace(pipeline, acceleration=acceleration)
        method = _method(pipeline, acceleration, request, layout)
        check_trained(pipeline.trained, {"": method}, layout)
        riflex = chosen_riflex("plain", pipeline.trained, facts)
        pipeline.residency.begin(pipeline.pipe, layout, settings, method)
        one_pass = guided_by(pipeline.guidance_free, pipeline.pipe, facts)
    start = time.perf_counter()
    with plain_messages(), one_pass, roped(pipeline.pipe, riflex):
        made = run_pipeline(pipeline.pipe, settings, method, **_options(pipeline), on_step=on_step)
    of_preset: list[str] = []
    if (preset := pipeline.preset) is not None:
        of_preset = [other_model_note(preset, facts), measured_note(preset, settings, dtype, device)]
    told = map(plain, filter(None, [*request.notes, limit, *of_preset]))
    made = replace(made, notes=(*pipeline.notes, *made.notes, *told))
    return _generation(pipeline, layout, settings, made, time.perf_counter() - start)


def _checked(pipeline: VideoPipeline, request: Filled) -> Settings:
    """The settings of a request with the model's defaults and what it starts from.

    Raises:
        BadInput: what the model, or a lever of its preset, cannot do with them.
    """
    facts, preset, adapters = pipeline.facts, request.preset, _adapters(pipeline, request)
    settings = suited(request.settings, adapters, facts)
    settings = read(settings, facts).checked(facts)
    check_guidance(adapters, facts, settings)
    if preset is not None:
        check_beside(preset, facts, settings, device=pipeline.residency.device)
        check_guidance_cache(preset, settings, bool(adapters))
        check_scheduler(preset, adapters)
    return settings


def _adapters(pipeline: VideoPipeline, request: Filled) -> tuple[GuidanceFreeAdapter, ...]:
    """The adapters with which guidance takes one pass, a node's or a preset's."""
    of_preset = request.guidance_free
    if of_preset is True:
        return own_adapters(pipeline.facts)
    return guidance_adapters(of_preset) if of_preset else pipeline.guidance_free


def _method(
    pipeline: VideoPipeline, acceleration: Acceleration | None, request: Filled, layout: VideoLayout
) -> Method | None:
    """What computes attention, None for dense; of the nodes that set it, one alone is there."""
    if pipeline.trained:
        return pipeline.trained[0].method
    if acceleration is not None:
        return acceleration.method_for(layout)
    if request.method is None:
        return None
    with said_of_preset(request.of_preset):
        return as_given(request.method, Sparse(), layout)


def _options(pipeline: VideoPipeline) -> dict[str, Any]:
    """What `run` is told beside the method."""
    acceleration, preset, options = pipeline.acceleration, pipeline.preset, {}
    if acceleration is not None:
        options = {"backend": acceleration.backend, "measure_error": acceleration.measure_error}
        options["precision"] = chosen_precision(acceleration.precision)
        options |= {"adapter": acceleration.adapters, "base": pipeline.facts.location}
    if preset is not None:
        # What the run has of these two stands in its settings, and was looked at there.
        levers = preset.replace(num_inference_steps=None, guidance_scale=None)
        options |= {"beside": levers, "base": pipeline.facts.location}
        for name, value in {"backend": preset.backend, "precision": preset.precision, "adapter": preset.sla}.items():
            options.setdefault(name, value)
    return options


def _generation(
    pipeline: VideoPipeline, layout: VideoLayout, settings: Settings, made: Run, seconds: float
) -> Generation:
    import torch

    from ...attention import RunReport

    acceleration = pipeline.acceleration
    report, heading = made.report or RunReport("", {}, ()), ""
    if made.report is None and not (acceleration or pipeline.preset or pipeline.guidance_free):
        heading = "Nothing was accelerated: Accelerate Pipeline, before Generate Video, does that."
    elif acceleration is not None:
        report = acceleration.reported(report)
        if made.report is None:
            heading = f"No call was sparse: {acceleration.dense_reason(layout)}."
    free = pipeline.guidance_free or (pipeline.preset is not None and pipeline.preset.guidance_free)
    one_pass = " in one pass" if free else ""
    account: list[str] = []
    if made.account is not None:
        account = [f"preset {made.account.preset}: {made.account.in_words()}", *made.account.own_notes]
    guidance = "" if settings.guidance_scale is None else f"guidance {settings.guidance_scale:g}{one_pass}, "
    told = (
        f"{settings.frames} frames of {settings.width}x{settings.height}, {_steps(pipeline, settings, made)}, "
        f"{guidance}seed {settings.seed}: {seconds:.1f} s with text and decoding"
    )
    report = replace(report, notes=(*report.notes, *made.notes, *map(plain, made.cut), *account, told))
    frames, shown = torch.from_numpy(made.frames).contiguous(), GenerationReport(News(report, heading))
    return Generation(frames, shown, settings.fps, _audio(made.sound, len(frames) / settings.fps))


def _steps(pipeline: VideoPipeline, settings: Settings, made: Run) -> str:
    """The steps of a run, in words; of a video that it starts from, only a part of them is made."""
    from ...pipelines.loading import call_defaults

    strength = pipeline.facts.row.strength
    if settings.video is None or not strength:
        return f"{settings.steps} steps"
    share = settings.strength
    if share is None:
        share = call_defaults(pipeline.facts.pipeline_class).get(strength, 1.0)
    return f"{len(made.step_ends)} of {settings.steps} steps (strength {share:g})"


def _audio(sound: Sound | None, seconds: float) -> dict[str, Any] | None:
    """ComfyUI's AUDIO of a sound, of no more than so many seconds."""
    import torch

    if sound is None:
        return None
    kept = sound.samples[: round(seconds * sound.rate)]
    return {"waveform": torch.from_numpy(kept.T.copy())[None], "sample_rate": sound.rate}
