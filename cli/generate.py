"""`vidaccel generate`: parsing and messages; the work is elsewhere."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from ..generation.errors import mention, refuse_given, worded
from ..generation.processes import Process
from .errors import one_line_errors, option
from .options import (
    OWN,
    Components,
    Device,
    Dtype,
    Offload,
    OffloadBlocks,
    Threads,
    Tiling,
    ValuesMayBeLeftOut,
    amount,
    method_settings,
    offloading,
    pipeline_arguments,
    use_threads,
)
from .processes import speaking, start, to_start


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("generate", cls=ValuesMayBeLeftOut)(generate_command)


def generate_command(
    prompt: Annotated[str, typer.Argument(help="What the video shows.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The video to write, an .mp4.")] = Path("out.mp4"),
    model: Annotated[
        str,
        typer.Option(
            show_default=False,
            help='"demo" or "demo-dc" (built in), a folder of a diffusers pipeline or of a training that made one, or '
            "a hub id owner/name. (default: that of --preset, otherwise demo)",
        ),
    ] = "",
    components: Components = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="A preset: a .yaml or .json file, the folder of a `vidaccel tune`, or a name of `vidaccel presets`. "
            "Other options go before it."
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            help="Skip steps: forecast, first_block, magcache, seacache, taylorseer or cache_dit; forecast=0.1 with a "
            "threshold."
        ),
    ] = None,
    guidance_cache: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Make one second pass of guidance in so many, after the first fifth of the steps, and extrapolate it "
            "in the others; 0 for none, where a preset has it.",
        ),
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="The linear layers in 8 bits by torchao, int8 or fp8.")] = None,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the transformer's blocks by torch, at the first step: the same video up to rounding, and "
            "each step faster; --no-compile where a preset has it.",
        ),
    ] = None,
    decoder: Annotated[
        str | None,
        typer.Option(
            help="A tiny decoder in the place of the autoencoder's: a file such as taew2_1.safetensors, a folder or a "
            "hub id; own, that of the model, as demo-dc has one."
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="A LoRA to load: a file, its folder, or that of its training; PATH=0.8 with another weight than 1; "
            "repeatable. Of a model with two transformers, transformer:PATH is for high noise, transformer_2:PATH for "
            "low noise, all:PATH for both. They go before all those of a preset; none leaves these out."
        ),
    ] = None,
    guidance_free: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[PATH]",
            help="Guidance in one pass a step, with an adapter of the recipe gft, or of consistency for few steps as "
            "well, one for each transformer: a file, its folder, or that of its training; without a path, with that of "
            "the model itself, if it has one; none leaves out what a preset has.",
        ),
    ] = None,
    sla: Annotated[
        list[Path] | None,
        typer.Option(
            help="An adapter of the recipe sla, which brings --method sla: a file, its folder, or that of its "
            "training; one for each transformer; none leaves out what a preset has, and the method that needs it."
        ),
    ] = None,
    rope: Annotated[
        str,
        typer.Option(help="plain, or riflex: of Wan and HunyuanVideo, for videos longer than those of the training."),
    ] = "plain",
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="dense, lvsa, radial, random, sla, sparge, svg, svg2, tangent, vsa (see `vidaccel methods`); "
            "repeatable. (default: sla or vsa for a model that was trained for it, or with --sla; tangent for a video "
            "of at least 8192 tokens, otherwise dense; with --compare: tangent, svg2, radial)"
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Also run dense from the same seed, and write a page beside the video, NAME.report.html."
        ),
    ] = False,
    negative_prompt: Annotated[str, typer.Option(help="What the video should not show.")] = "",
    image: Annotated[Path | None, typer.Option(help="The first frame, for image-to-video models.")] = None,
    last_image: Annotated[
        Path | None, typer.Option(help="The last frame, for image-to-video models that take one.")
    ] = None,
    video: Annotated[
        Path | None,
        typer.Option(help="A video to start from, to go on from or to be led by, for models that take one."),
    ] = None,
    face_video: Annotated[Path | None, typer.Option(help="For Wan Animate, whose --video is that of the pose.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="With --video: how much of the noise is added to it, above 0 and at most 1.")
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(help="Frames: 4k+1 for Wan, 8k+1 for LTX, any for DC-VideoGen, ... (default: the model's)"),
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels. (default: the model's)")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels. (default: the model's)")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. (default: the model's)")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is no guidance. (default: the model's)")] = None,
    seed: Annotated[int, typer.Option(help="Of the initial noise.")] = 0,
    fps: Annotated[
        float | None,
        typer.Option(help="Frames per second of the file. (default: those of --video, otherwise the model's)"),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            help="Share of attention to compute in sparse steps, above 0 and at most 1. (default: the method's)"
        ),
    ] = None,
    dense_steps: Annotated[
        str | None,
        typer.Option(help="First steps that stay dense: a count (4) or a fraction (0.2). (default: the method's)"),
    ] = None,
    dense_layers: Annotated[
        str | None, typer.Option(help="First layers that stay dense: a count or a fraction. (default: the method's)")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting of a method, such as tangent.tolerance=0.02; repeatable."),
    ] = None,
    pipeline_option: Annotated[
        list[str] | None,
        typer.Option(help="A further argument of the pipeline's call, such as true_cfg_scale=6; repeatable."),
    ] = None,
    backend: Annotated[str, typer.Option(help="What computes attention: auto, or a name of `vidaccel info`.")] = "auto",
    measure_error: Annotated[
        int,
        typer.Option(
            help="Queries of each sparse call whose true error is measured and reported, 64 for example; takes time."
        ),
    ] = 0,
    precision: Annotated[
        str | None,
        typer.Option(help="int8: Q K^T of sparse attention in 8 bits, by Triton's kernels. (default: that of --dtype)"),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offload: Offload = False,
    offload_blocks: OffloadBlocks = False,
    vae_tiling: Tiling = False,
    threads: Threads = None,
    processes: Annotated[
        int | None,
        typer.Option(
            help="Processes that make the video together, one for each GPU of this machine; started by torchrun, "
            "vidaccel counts them itself. (default: 1)"
        ),
    ] = None,
    share: Annotated[
        str,
        typer.Option(
            help="What they share: guidance (two, a branch each), sequence (Ulysses), both, or auto, which is both "
            "where it can be and their number is even."
        ),
    ] = "auto",
    warm_up: Annotated[
        bool, typer.Option(help="With --compare: one uncounted step before each run, so that compilation is not timed.")
    ] = True,
    report: Annotated[
        Path | None, typer.Option(help="The page of --compare. (default: NAME.report.html beside --out, NAME.mp4)")
    ] = None,
) -> None:
    """Make a video from PROMPT, dense or accelerated.

    With several methods, --out is the video of the first; the others lie beside it as NAME.METHOD.mp4.
    """
    with one_line_errors(by_blocks=offload_blocks), ExitStack() as spoken:
        process = Process.this()
        spoken.enter_context(speaking(process.first))
        if count := to_start(processes, process):
            raise typer.Exit(start(count))
        from ..generation.api import carry_out, check_files_of, check_outputs, compared
        from ..generation.job import prepare
        from ..generation.levers.presets import request_preset
        from ..generation.models.places import DEMOS
        from ..generation.outputs import check_file
        from ..generation.progress import bars
        from ..generation.report.page import write_report
        from ..generation.requests.settings import Settings
        from ..generation.requests.sparse import Sparse
        from ..generation.requests.values import check_name
        from .terminal import command_line, page_line, print_summary, printing, then_printed

        settings = Settings(
            prompt,
            negative_prompt,
            frames,
            height,
            width,
            steps,
            guidance_scale,
            seed,
            fps,
            image,
            last_image,
            video,
            strength,
            face_video,
            pipeline_arguments(pipeline_option or []),
        )
        refuse_given({"no_warm_up": not (warm_up or compare)}, f"of {mention('compare')} alone")
        check_file("out", out, ".mp4")
        page = report
        if compare and report is None:
            page = out.with_name(f"{out.stem}.report.html")
            check_name("out", page)
        check_outputs(out, page, compare)
        use_threads(threads)  # before what was measured with as many is looked up
        sparse = Sparse(
            methods=method or (),
            density=density,
            dense_steps=amount("dense_steps", dense_steps),
            dense_layers=amount("dense_layers", dense_layers),
            overrides=method_settings(setting or []),
            backend=backend,
            measure_error=measure_error,
            precision=precision,
        )
        chosen = request_preset(preset)
        job = prepare(
            model or (chosen.model if chosen else "") or DEMOS[0],
            settings,
            sparse,
            compare=compare,
            device=device,
            dtype=dtype,
            offload=offloading(offload, offload_blocks),
            tiling=vae_tiling,
            lora=lora or (),
            guidance_free=True if guidance_free == [OWN] else guidance_free or (),
            sla=sla or (),
            rope=rope,
            components=components,
            preset=chosen,
            levers={
                "cache": cache,
                "quantize": quantize,
                "decoder": decoder,
                "guidance_cache": guidance_cache,
                "compile": compile,
            },
            process=process,
            share=share,
        )
        check_files_of(job, out, page, preset)
        if not method:
            typer.echo(worded(f"method {', '.join(job.methods)}: {job.why}", option))
        # What is cut off pictures and videos is known before the weights are read, and told again with each video.
        said = [worded(note) for note in job.settings.notes]
        for note in (*filter(None, [job.hint]), *job.notes, *job.settings.notes):
            typer.echo(worded(note, option))

        def told(note: str) -> None:
            said.append(worded(note))
            if process.first:
                typer.echo(worded(note, option), err=True)

        files = job.files(out)
        with bars(job.facts.name) if process.first else nullcontext() as on_stage:
            videos = carry_out(job, files, warm=warm_up and compare, on_stage=on_stage, on_note=told)
        if not process.first:
            return
        if not compare:
            with printing(f"The video: {out}"):
                print_summary(videos, files, said=said)
            return
        made = compared(job, videos, tuple(files.values()), command_line(), option)
        with then_printed(lambda: print_summary(videos, files, made, said), page_line("comparison", page)):
            write_report(made, page)
