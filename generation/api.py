"""`vidaccel.generate`: a prompt to a video, or to a comparison with the dense one."""

from __future__ import annotations

import contextlib
import logging
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from .crew import Crew, joined
from .errors import BadInput, mention, worded
from .forecast import decoding_note
from .job import Job, prepare
from .levers.guidance import guided_by, placed
from .levers.length import roped
from .levers.loras import attach
from .levers.methods import measured_note
from .levers.presets import refusals, request_preset
from .machine import environment
from .media.video import check_encoder
from .outputs import check_file, check_files
from .progress import bars
from .report.comparison import Comparison, GeneratedVideo
from .report.described import call_text, described
from .report.page import files_beside, video_file, write_report
from .requests.filled import said_of_preset
from .requests.local_files import local_files
from .requests.settings import Settings
from .requests.sparse import Sparse
from .requests.values import check_switches, file_name
from .run import NoteCallback, StageCallback, load, make_videos

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from ..attention.methods.base import Method
    from ..pipelines.guidance_cache.settings import GuidanceCache
    from ..pipelines.loras.files import LoraFile
    from ..pipelines.presets import Cache, Compile, Preset, Quantize
    from .requests.options import GenerateOptions


logger = logging.getLogger(__name__)


@overload
def generate(
    model: str | Path | DiffusionPipeline,
    prompt: str,
    *,
    compare: Literal[False] = ...,
    **options: Unpack[GenerateOptions],
) -> GeneratedVideo: ...
@overload
def generate(
    model: str | Path | DiffusionPipeline, prompt: str, *, compare: Literal[True], **options: Unpack[GenerateOptions]
) -> Comparison: ...
@overload
def generate(
    model: str | Path | DiffusionPipeline, prompt: str, *, compare: bool, **options: Unpack[GenerateOptions]
) -> GeneratedVideo | Comparison: ...
def generate(
    model: str | Path | DiffusionPipeline,
    prompt: str,
    *,
    method: str | Method | Sequence[str | Method] | None = None,
    compare: bool = False,
    negative_prompt: str = "",
    image: Any = None,
    last_image: Any = None,
    video: Any = None,
    strength: float | None = None,
    face_video: Any = None,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    fps: float | None = None,
    density: float | None = None,
    dense_steps: int | float | None = None,
    dense_layers: int | float | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    pipeline_options: Mapping[str, Any] | None = None,
    backend: str = "auto",
    measure_error: int = 0,
    precision: str | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    offload: bool | str = False,
    tiling: bool = False,
    lora: str | Path | LoraFile | Sequence[str | Path | LoraFile] | None = (),
    guidance_free: bool | str | Path | Sequence[str | Path] | None = (),
    sla: str | Path | Sequence[str | Path] | None = (),
    rope: str = "plain",
    components: str | Path | None = None,
    preset: str | Path | Preset | None = None,
    cache: str | Cache | None = None,
    guidance_cache: int | GuidanceCache | None = None,
    quantize: str | Quantize | None = None,
    compile: bool | str | Compile | None = None,
    decoder: str | Path | None = None,
    out: str | Path | None = None,
    report: str | Path | None = None,
    warm_up: bool = True,
    progress: bool = True,
) -> GeneratedVideo | Comparison:
    """Make a video from a prompt, dense or accelerated, or compare methods with the dense video of the same seed.

    Everything that can be checked is checked before weights are read.

    Args:
        model: "demo" or "demo-dc" (built in), a folder of a diffusers pipeline, a hub id, or a loaded pipeline, which
            stays as it is; or the file of a transformer, as ComfyUI has it, with `components`.
        prompt, negative_prompt: what the video shows, and what it should not show.
        method: "dense", a name of `METHODS` or a config such as `SVG2(top_p=0.9)`; with `compare`, several, of which
            those of one method are named by what differs ("svg2-top_p=0.9"). None takes SLA for a model that was
            trained for it, Tangent for a video of at least 8192 tokens and dense for a shorter one (or of as many as
            `vidaccel break-even` measured on this machine); with `compare`, Tangent, SVG2 and Radial.
        compare: also run dense, first, and measure the others against it.
        image, last_image: the first and the last frame, for image to video: a file, a PIL picture, or an array
            `[H, W, 3]` of bytes or of floats in [0, 1].
        video: for video to video: a file, a list of files or PIL pictures, or an array `[F, H, W, 3]` of the same.
        strength: how much of the noise is added to `video`, in (0, 1].
        face_video: of the face that moves, for Wan Animate, whose `video` is that of the pose.
        frames, height, width, steps, guidance_scale: None takes the model's.
        seed: of the initial noise.
        fps: frames per second of the result; None for those of a file in `video`, and the model's without one.
        density: share of attention to compute in sparse steps; None takes the method's.
        dense_steps, dense_layers: first steps and layers that stay dense: a count (int) or a fraction (float).
        settings: further settings by method: `{"svg2": {"top_p": 0.85}}`.
        pipeline_options: further arguments of the pipeline's call, by its own names: `{"true_cfg_scale": 6.0}`.
        backend: what computes attention, a name of `BACKENDS`, or "auto".
        measure_error: queries of each sparse call whose true error is measured and reported, see `accelerate`; times
            then include the measuring.
        precision: "int8" computes Q K^T of sparse attention in 8 bits, see `accelerate`; None, in `dtype`.
        device, dtype: torch's, a name, or "auto"; of a loaded pipeline they are its own.
        offload: keep on the device only the part that is at work; "blocks", of a transformer that is larger than the
            device one block at a time.
        tiling: encode and decode in tiles.
        lora: LoRAs to load: a file, its folder or that of its training each, "PATH=WEIGHT" with another weight than 1,
            "TARGET:PATH" into one of the transformers of a model with two ("transformer" for high noise,
            "transformer_2" for low noise, "all" for both); or a `LoraFile` of `vidaccel.pipelines.presets`. One of the
            recipe `length` brings the attention that it was trained for. They go before all those of a preset; "none"
            leaves these out.
        guidance_free: adapter of the recipe `gft`, with which guidance takes one pass a step, or of `consistency`,
            which makes few steps as well: a file, its folder or that of its training, or one for each of two
            transformers; True for what the model has of its own, as the built-in ones do; "none" for none, where a
            preset has one.
        sla: adapter of the recipe `sla`, which brings the method "sla": likewise, but for True. A model whose weights
            were trained needs none.
        rope: of Wan and HunyuanVideo: "plain", or "riflex", which keeps a video longer than those of the training from
            beginning anew (RIFLEx, arXiv 2502.15894).
        components: of such a file: folder or hub id of the pipeline of the same model that has text encoder,
            autoencoder, scheduler and tokenizer.
        preset: all of the above that makes a video faster, see `vidaccel.apply`: a file, the folder of a `tune`, or the
            name of one that comes with the package. What is given beside it goes before what it says.
        guidance_cache: leaves second passes of guidance out: a `GuidanceCache`, or its `every`; 0 for none.
        cache: over steps: a name with or without its threshold, "first_block=0.08", or a `Cache`.
        quantize: the linear layers in 8 bits, by torchao: "int8" or "fp8", or a `Quantize`.
        compile: the transformer's blocks by `torch.compile`, at the first step: True, a mode, or a `Compile`.
        decoder: a tiny one in the place of the autoencoder's, see `vidaccel.tiny_decoder`: a file, a folder, a hub id,
            or "own" for that of the model, as the built-in demo-dc has one.
        out: MP4 file to write; with `compare`, that of the first method, with the others beside it. Files that are
            there are replaced, but none that the request reads.
        report: HTML page to write, with `compare` alone; its numbers (.json) and contact sheet (.png) go beside it.
        warm_up: with `compare`, one uncounted step before each run, so that compilation is not timed.
        progress: show bars.

    Returns:
        The video, or with `compare` all of them and their metrics.

    Raises:
        BadInput: a request that cannot be met.
        GenerationError: the model made NaN or infinite values.
    """
    given = dict(locals())
    wanted = Settings(
        prompt,
        negative_prompt,
        frames,
        height,
        width,
        steps,
        guidance_scale,
        seed,
        fps,
        image=image,
        last_image=last_image,
        video=video,
        strength=strength,
        face_video=face_video,
        pipeline_options=pipeline_options or {},
    )
    file, page = (
        None if path is None else file_name(field, path) for field, path in (("out", out), ("report", report))
    )
    check_switches(compare=compare, tiling=tiling, warm_up=warm_up, progress=progress)
    check_outputs(file, page, compare)
    methods: Sequence[str | Method]
    if method is None:
        methods = ()
    else:
        methods = list(method) if isinstance(method, Iterable) and not isinstance(method, str) else [method]
    if len(methods) > 1 and not compare:
        raise BadInput(
            "method", "can have several only in a comparison", "Add compare=True, or call this once for each."
        )
    job = prepare(
        str(model) if isinstance(model, Path) else model,
        wanted,
        Sparse(methods, density, dense_steps, dense_layers, settings or {}, backend, measure_error, precision),
        compare=compare,
        device=device,
        dtype=dtype,
        offload=offload,
        tiling=tiling,
        lora=lora,
        guidance_free=guidance_free,
        sla=sla,
        rope=rope,
        components=components,
        preset=request_preset(preset),
        levers={
            "cache": cache,
            "quantize": quantize,
            "decoder": decoder,
            "guidance_cache": guidance_cache,
            "compile": compile,
        },
    )
    check_files_of(job, file, page, preset)
    files = video_files(job, file, page)
    shown = bars("" if job.pipe is not None else job.facts.name) if progress else contextlib.nullcontext()
    with shown as on_stage:
        videos = carry_out(job, files, warm=warm_up and compare, on_stage=on_stage)
    if not compare:
        return replace(videos[0], notes=(*map(worded, job.notes), *videos[0].notes))
    made = compared(job, videos, tuple(files.values()), call_text(generate, given))
    return made if page is None else write_report(made, page)


def check_outputs(out: Path | None, report: Path | None, compare: bool) -> None:
    """Raise BadInput for files that cannot be written there, and for a report without a comparison."""
    if out is not None:
        check_file("out", out, ".mp4")
    if report is not None and not compare:
        raise BadInput("report", f"is the page of {mention('compare')}", "Give both.")
    if report is not None:
        check_file("report", report, ".html")
    if out is not None or report is not None:
        check_encoder()


def video_files(job: Job, out: Path | None, report: Path | None) -> dict[str, Path]:
    """A file for the video of each run: those of `Job.files`, or beside the page where it alone is asked for."""
    if out is not None:
        return job.files(out)
    return {} if report is None else {name: video_file(report, name) for name in job.methods}


def check_files_of(job: Job, out: Path | None, report: Path | None, preset: Preset | str | Path | None = None) -> None:
    """Raise BadInput unless all the files of a job can be written; see `outputs.check_files`.

    Args:
        job: of `prepare`.
        out, report: what is to be written; None for nothing.
        preset: of the request, as it was given: its file is read, too.
    """
    inputs = {**job.inputs, **local_files({"preset": preset})}
    if out is not None:
        check_files("out", out, job.files(out).values(), inputs)
    if report is not None:
        videos = video_files(job, None, report).values() if out is None else ()
        check_files("report", report, [report, *files_beside(report), *videos], inputs)


def carry_out(
    job: Job,
    files: Mapping[str, Path] | None = None,
    *,
    warm: bool = False,
    on_stage: StageCallback | None = None,
    on_note: NoteCallback = lambda note: logger.warning(worded(note)),
) -> list[GeneratedVideo]:
    """Load what is not loaded, and make every video of a job; each is written as soon as it is there.

    Of several processes all do the same, and the first one alone makes videos of it.

    Args:
        job: of `prepare`.
        files: of `video_files`, one for each run; None writes nothing.
        warm: an uncounted step before each run.
        on_stage: told of what happens.
        on_note: told what a user should know before the steps or after the first one, to be `worded`.
    """
    with joined(job) as crew, said_of_preset(job.of_preset):
        return _carried_out(job, files or {}, warm, on_stage, on_note, crew)


def _carried_out(
    job: Job,
    files: Mapping[str, Path],
    warm: bool,
    on_stage: StageCallback | None,
    on_note: NoteCallback,
    crew: Crew | None,
) -> list[GeneratedVideo]:
    pipe = job.pipe
    if pipe is None:
        place = "cpu" if job.is_quantised_first else job.device
        pipe = load(job.facts, job.dtype, place, offload=job.offload, tiling=job.tiling)
        for note in attach(pipe, job.loras):
            on_note(note)
        if job.is_quantised_first:
            from ..pipelines.presets.applied import quantise_for_good

            with refusals():
                quantise_for_good(pipe, job.beside, job.device, job.facts.location)
        if note := _before_the_steps(job, pipe):
            on_note(note)
    if job.compare and job.beside is not None:  # else it would be refused after the dense video, which has none of it
        from ..pipelines.presets.checks import check_preset

        with refusals():
            check_preset(pipe, job.beside, None if job.pipe is not None else job.facts.location)
    if crew is not None:
        crew.share_sequences(pipe)
    videos, said = [], set()

    def told(note: str) -> None:
        if note not in said:  # in a comparison, each run would say it
            said.add(note)
            on_note(note)

    with guided_by(job.guidance_free, pipe, placed(job.facts, job.pipe)), roped(pipe, job.riflex):
        for video in make_videos(job, pipe, warm=warm, on_stage=on_stage, on_note=told, crew=crew):
            if files:
                video.save(files[video.name])
            videos.append(replace(video, notes=(*video.notes, *_density_notes(job, video))))
    return videos


def _before_the_steps(job: Job, pipe: DiffusionPipeline) -> str:
    """What may end the run after its steps, whose work would be lost; "" for nothing."""
    import torch

    if job.device.type != "cuda":
        return ""
    capacity = torch.cuda.get_device_properties(job.device).total_memory
    return decoding_note(pipe, job.settings, job.device, capacity)


def _density_notes(job: Job, video: GeneratedVideo) -> list[str]:
    """Whether the sparse calls of a run had the density that was to be expected of the one asked for."""
    method = job.methods[video.name]
    densities = [] if video.report is None else [r.density for r in video.report.records if not r.reason]
    if job.density is None or method is None or not densities:
        return []
    expected = method.expected_density(job.layout)
    note = measured_note(video.name, statistics.fmean(densities), job.density if expected is None else expected)
    return [note] if note else []


def compared(
    job: Job,
    videos: Sequence[GeneratedVideo],
    files: Sequence[Path],
    command: str,
    name: Callable[[str], str] = str,
) -> Comparison:
    """The comparison that a job was for; its texts name fields by `name`."""
    return Comparison(
        prompt=job.settings.prompt,
        videos=tuple(videos),
        tokens=job.layout.tokens,
        settings=described(job, name),
        environment=environment(job.device),
        command=command,
        files=tuple(files),
        # The runs start from the same pictures, and have the same to say of them.
        notes=tuple(dict.fromkeys(worded(note, name) for note in (*job.notes, *(n for v in videos for n in v.notes)))),
    )
