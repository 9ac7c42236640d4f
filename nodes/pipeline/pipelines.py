"""Video pipelines of diffusers under ComfyUI: which there are, loading one, accelerating it, making a video with it.

No ComfyUI module is imported here: the nodes hand in what moves weights, what stops a run and what shows progress, so
that tests can run all of it. diffusers is imported inside functions, since it takes seconds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...generation.calls import as_class, dtype_of
from ...generation.errors import BadInput
from ...generation.levers.guidance import (
    check_adapters,
    check_guidance,
    guidance_adapters,
    guided_by,
    own_adapters,
    suited,
)
from ...generation.levers.length import check_bases, check_trained, chosen_riflex, roped, trained_lengths
from ...generation.levers.lora_fit import trained_elsewhere
from ...generation.machine import check_runs, choose_dtype
from ...generation.models.facts import ModelFacts
from ...generation.models.inspected import inspect_model
from ...generation.models.places import DEMOS
from ...generation.packages import lacking
from ...generation.requests.settings import Settings
from ...generation.run import Run, StepCallback
from ...generation.run import load as load_pipeline
from ...generation.run import run as run_pipeline
from ..report.news import GenerationReport, News
from ..report.wording import InputError, check_precision, check_stand_ins, chosen_precision, plain, plain_messages
from .acceleration import Acceleration
from .inputs import Clip, read
from .loras import Lora, attach
from .residency import Residency

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from ...attention import VideoLayout
    from ...generation.media.sound import Sound
    from ...pipelines.guidance_free.adapter_file import GuidanceFreeAdapter
    from ...pipelines.length.trained import TrainedLength
    from ...pipelines.presets import Preset

# What the menu shows -> what it is called elsewhere.
BUILT_IN = {f"{name} (built-in)": name for name in DEMOS}
REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements-pipelines.txt"


# -- which pipelines there are -----------------------------------------------------------------------------------------


def find_pipelines(roots: list[str]) -> dict[str, Path]:
    """The pipelines that `save_pretrained` wrote below some folders.

    Args:
        roots: ComfyUI's folders for diffusers models, those that do not exist included.

    Returns:
        Path below its root, with "/" -> folder. The first of two of one name counts, as with ComfyUI's own models.
    """
    found: dict[str, Path] = {}
    for root in roots:
        for folder, below, files in os.walk(root, followlinks=True):
            below[:] = sorted(name for name in below if not name.startswith("."))
            if "model_index.json" in files:
                below.clear()  # the parts of a pipeline are no pipelines
                found.setdefault(Path(folder).relative_to(root).as_posix(), Path(folder))
    return found


def locate(choice: str, hub_id: str, roots: list[str]) -> str:
    """What `inspect_model` is to look at: the hub id or folder that was typed, otherwise what was chosen.

    Raises:
        BadInput: the chosen folder is gone.
    """
    if hub_id.strip():
        return hub_id.strip()
    if choice in BUILT_IN:
        return BUILT_IN[choice]
    found = find_pipelines(roots)
    if choice not in found:
        problem = f"it is no longer in models/diffusers; there are {', '.join(found) or 'none'}"
        raise BadInput("model", problem, value=choice)
    return str(found[choice])


# -- what is on the wire -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class VideoPipeline:
    """A loaded pipeline and how to accelerate it. Immutable: `accelerated` gives another one with the same weights.

    Args:
        facts: what its configs say.
        pipe: the diffusers pipeline; dense between two runs, whatever `acceleration` says.
        residency: sees to it that the part at work is on the device.
        acceleration: None for dense attention.
        guidance_free: adapters for guidance in one pass; none for two.
        trained: what LoRAs for longer videos in it were trained with.
        preset: all levers at once; None for none.
        notes: what is to be said of its LoRAs with each video.
    """

    facts: ModelFacts
    pipe: DiffusionPipeline
    residency: Residency
    acceleration: Acceleration | None = None
    trained: tuple[TrainedLength, ...] = ()
    guidance_free: tuple[GuidanceFreeAdapter, ...] = ()
    preset: Preset | None = None
    notes: tuple[str, ...] = ()

    def guided_in_one_pass(self, adapters: Sequence[Path]) -> VideoPipeline:
        """The same weights with guidance in one pass, this object as it is.

        Args:
            adapters: a file or folder for each transformer; none for what the model has of its own.

        Raises:
            InputError: one cannot be read or is of another model, or the model has none of its own; or the pipeline is
                guided in one pass already.
        """
        if self.guidance_free:
            raise InputError(
                "this pipeline is guidance-free already: connect the pipeline from before the other Guidance-Free "
                "Pipeline."
            )
        for lever in ("guidance_free", "guidance_cache"):
            if getattr(self.preset, lever, None):
                raise InputError(f"the preset {self.preset.name} has {lever}: leave one of the two out.")
        with plain_messages():
            found = guidance_adapters(adapters) if adapters else own_adapters(self.facts)
            check_adapters(found, self.facts)
        return replace(self, guidance_free=found)

    def accelerated(self, acceleration: Acceleration) -> VideoPipeline:
        """The same weights with an acceleration, this object as it is.

        Raises:
            ValueError: the backend cannot run on the device, or not with `compensate`, Tangent or that precision.
            InputError: all of its layers would stay dense, a LoRA in it was trained for an attention of its own, or it
                has an acceleration already.
        """
        if self.acceleration is not None:
            raise InputError(
                "this pipeline has sparse attention already: connect the pipeline from before the other Accelerate "
                "Pipeline or Apply SLA (Pipeline)."
            )
        if self.trained:
            raise InputError(
                f"{self.trained[0].name} was trained for one attention alone ({self.trained[0]}), which Generate Video "
                "takes from its file: leave Accelerate Pipeline out."
            )
        if self.preset is not None and self.preset.method is not None:
            raise InputError(f"the preset {self.preset.name} has a method: leave one of the two out.")
        with plain_messages():
            check_runs(acceleration.backend, self.residency.device, sparse=True)
            if not self.facts.only_dense:
                acceleration.check_layers(self.pipe)
        check_stand_ins(acceleration.backend, self.residency.device, acceleration.stand_ins)
        check_precision(acceleration.backend, self.residency.device, acceleration.precision)
        return replace(self, acceleration=acceleration)

    def starting_from(self, given: Sequence[str]) -> VideoPipeline:
        """The same weights in the pipeline that takes what is given, of image, last_image and video.

        Raises:
            BadInput: a video for one of Wan 2.2's with two transformers.
        """
        facts = inspect_model(self.facts.name, **{name: name in given for name in ("image", "last_image", "video")})
        if facts.pipeline_class == self.facts.pipeline_class:
            return self
        return replace(self, facts=facts, pipe=as_class(self.pipe, facts.pipeline_class))


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


# -- loading and running -----------------------------------------------------------------------------------------------


def require_packages(who: str = "diffusers pipelines need", more: Sequence[str] = ()) -> None:
    """Raise InputError when a package that pipelines need is not there or too old: native models run without them.

    Args:
        who: needs them, as the start of the message.
        more: what it needs besides, as pip takes it.
    """
    if wrong := lacking(REQUIREMENTS, more):
        beside = "".join(f' "{each}"' for each in more)
        raise InputError(f"{who} {', '.join(wrong)}: with ComfyUI's Python, pip install -r {REQUIREMENTS}{beside}")


def load(model: str, dtype: str, residency: Residency, loras: Sequence[Lora] = ()) -> VideoPipeline:
    """Load a pipeline; its weights stay in main memory until they are used.

    Args:
        model: "demo", a folder, or a hub id.
        dtype: "auto" or a name of `machine.DTYPES`.
        residency: for its device; hooks itself into the pipeline.
        loras: to be put into its transformers.

    Raises:
        InputError: there is no such pipeline, it is not one that can be accelerated, its weights cannot be read, or a
            LoRA does not fit it.
    """
    require_packages()
    with plain_messages():
        facts = inspect_model(model)
        chosen = choose_dtype(dtype, residency.device, model)
        trained = trained_lengths(loras)
        check_bases(loras, facts)
        import torch

        # ComfyUI runs nodes in inference mode, whose tensors could not be adapted or trained later.
        with torch.inference_mode(False):
            pipe = load_pipeline(facts, chosen, "cpu")
            attach(pipe, loras)
    residency.attach(pipe)
    return VideoPipeline(facts, pipe, residency, trained=trained, notes=tuple(trained_elsewhere(loras, facts)))


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
        preset = pipeline.preset
        if preset is not None:
            own: dict[str, Any] = {"steps": preset.num_inference_steps, "guidance_scale": preset.guidance_scale}
            unset = {name: value for name, value in own.items() if getattr(settings, name) is None}
            settings = replace(settings, **unset)
        settings = suited(settings, pipeline.guidance_free, pipeline.facts)
        settings = read(settings, pipeline.facts).checked(pipeline.facts)
        check_guidance(pipeline.guidance_free, pipeline.facts, settings)
        layout = settings.layout(pipeline.facts)
        acceleration = pipeline.acceleration
        if acceleration is not None and pipeline.facts.only_dense:
            raise BadInput("model", pipeline.facts.only_dense, "Leave Accelerate Pipeline out.")
        limit = ""
        if acceleration is not None:
            acceleration, limit = acceleration.on(pipeline.facts, pipeline.residency.device, dtype_of(pipeline.pipe))
            pipeline = replace(pipeline, acceleration=acceleration)
        method = acceleration.method_for(layout) if acceleration else None
        if preset is not None and preset.method is not None:
            method = preset.method
            method.check(layout)
        if pipeline.trained:
            method = pipeline.trained[0].method
        check_trained(pipeline.trained, {"": method}, layout)
        riflex = chosen_riflex("plain", pipeline.trained, pipeline.facts)
        pipeline.residency.begin(pipeline.pipe, layout, settings, method)
    start = time.perf_counter()
    options: dict[str, Any] = {}
    if acceleration is not None:
        options = {"backend": acceleration.backend, "measure_error": acceleration.measure_error}
        options["precision"] = chosen_precision(acceleration.precision)
        options |= {"adapter": acceleration.adapters, "base": pipeline.facts.location}
    if preset is not None:
        options |= {"beside": preset, "base": pipeline.facts.location}
        options.setdefault("backend", preset.backend)
        options.setdefault("adapter", preset.sla)
    with plain_messages():
        one_pass = guided_by(pipeline.guidance_free, pipeline.pipe, pipeline.facts)
    with plain_messages(), one_pass, roped(pipeline.pipe, riflex):
        made = run_pipeline(pipeline.pipe, settings, method, **options, on_step=on_step)
    made = replace(made, notes=(*pipeline.notes, *made.notes, *filter(None, [limit])))
    return _generation(pipeline, layout, settings, made, time.perf_counter() - start)


def _generation(
    pipeline: VideoPipeline, layout: VideoLayout, settings: Settings, made: Run, seconds: float
) -> Generation:
    import torch

    from ...attention import RunReport

    acceleration = pipeline.acceleration
    report, heading = made.report or RunReport("", {}, ()), ""
    if acceleration is None and made.report is None and pipeline.preset is None:
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
        f"{settings.frames} frames of {settings.width}x{settings.height}, {settings.steps} steps, {guidance}"
        f"seed {settings.seed}: {seconds:.1f} s with text and decoding"
    )
    report = replace(report, notes=(*report.notes, *made.notes, *map(plain, made.cut), *account, told))
    frames, shown = torch.from_numpy(made.frames).contiguous(), GenerationReport(News(report, heading))
    return Generation(frames, shown, settings.fps, _audio(made.sound, len(frames) / settings.fps))


def _audio(sound: Sound | None, seconds: float) -> dict[str, Any] | None:
    """ComfyUI's AUDIO of a sound, of no more than so many seconds."""
    import torch

    if sound is None:
        return None
    kept = sound.samples[: round(seconds * sound.rate)]
    return {"waveform": torch.from_numpy(kept.T.copy())[None], "sample_rate": sound.rate}
