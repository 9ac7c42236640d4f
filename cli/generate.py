"""`vidaccel generate`: parsing and messages; the work is elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..generation.errors import BadInput, one_line_errors
from .options import DENSE, amount, check_file, check_methods, check_sparse_options, choose_methods, method_settings

if TYPE_CHECKING:
    from ..attention.methods.base import Method


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("generate")(generate_command)


def generate_command(
    prompt: Annotated[str, typer.Argument(help="What the video shows.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The video to write, an .mp4.")] = Path("out.mp4"),
    model: Annotated[
        str,
        typer.Option(help='"demo" or "demo-dc" (built in), a folder of a diffusers pipeline, or a hub id owner/name.'),
    ] = "demo",
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="dense, radial, random, svg, svg2 (see `vidaccel methods`); repeatable. "
            "(default: svg2 for a video of at least 8192 tokens, otherwise dense; with --compare: svg2, radial, svg)"
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Also run dense from the same seed, and write report.html beside the video."),
    ] = False,
    negative_prompt: Annotated[str, typer.Option(help="What the video should not show.")] = "",
    image: Annotated[Path | None, typer.Option(help="The first frame, for image-to-video models.")] = None,
    frames: Annotated[
        int | None, typer.Option(help="Frames, 4k+1 for Wan, any for DC-VideoGen. (default: the model's)")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels. (default: the model's)")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels. (default: the model's)")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. (default: the model's)")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is no guidance. (default: the model's)")] = None,
    seed: Annotated[int, typer.Option(help="Of the initial noise.")] = 0,
    fps: Annotated[float, typer.Option(help="Frames per second of the file.")] = 16,
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
        typer.Option("--set", help="Any setting of a method, such as svg2.top_p=0.85; repeatable."),
    ] = None,
    backend: Annotated[str, typer.Option(help="What computes attention: auto, or a name of `vidaccel info`.")] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (bfloat16 on a GPU), float32, bfloat16 or float16.")] = "auto",
    offload: Annotated[bool, typer.Option("--offload", help="Keep on the GPU only the part that is at work.")] = False,
    vae_tiling: Annotated[
        bool, typer.Option("--vae-tiling", help="Encode and decode in tiles: less memory for large frames.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads. (default: torch's)")] = None,
    warm_up: Annotated[
        bool, typer.Option(help="With --compare: one uncounted step before each run, so that compilation is not timed.")
    ] = True,
    report: Annotated[
        Path | None, typer.Option(help="The page of --compare. (default: report.html beside --out)")
    ] = None,
) -> None:
    """Make a video from PROMPT, dense or accelerated.

    With several methods, --out is the video of the first; the others lie beside it as NAME.METHOD.mp4.
    """
    with one_line_errors():
        from ..generation.request import (
            Settings,
            build_method,
            check_backend,
            choose_device,
            choose_dtype,
            inspect_model,
        )
        from ..generation.run import environment
        from ..pipelines.loading import usual_autoencoder_dtype
        from .terminal import make_videos, print_summary, write_comparison

        # What needs no import of torch is checked first, what needs the model's configs last; no weights are read yet.
        settings = Settings(prompt, negative_prompt, frames, height, width, steps, guidance_scale, seed, fps, image)
        page = report if report is not None else out.with_name("report.html")
        check_file("--out", out, ".mp4")
        if compare:
            check_file("--report", page, ".html")
        elif report is not None:
            raise BadInput("--report is the page of --compare: give both.")
        if density is not None and not 0 < density <= 1:
            raise BadInput(f"--density is {density}: it must be above 0 and at most 1 (1 is dense).")
        if threads is not None and threads < 1:
            raise BadInput(f"--threads is {threads}: it must be at least 1.")
        amounts = {
            "dense_steps": amount("--dense-steps", dense_steps),
            "dense_layers": amount("--dense-layers", dense_layers),
        }
        overrides = method_settings(setting or [])
        asked = method or []
        check_methods(asked, compare)
        place = choose_device(device, offload)
        chosen_dtype = choose_dtype(dtype, place, model)
        facts = inspect_model(model, image=settings.image is not None)
        settings = settings.checked(facts)
        layout = facts.layout(settings.frames, settings.height, settings.width)
        names, why = choose_methods(asked, compare, layout.tokens)
        sparse_only = {
            "--density": density is not None,
            "--dense-steps": dense_steps is not None,
            "--dense-layers": dense_layers is not None,
            "--set": bool(overrides),
            "--backend": backend != "auto",
        }
        check_sparse_options(names, bool(asked), sparse_only)
        check_backend(backend, place, sparse=any(name != DENSE for name in names))
        methods: dict[str, Method | None] = {}
        for name in names:
            values = overrides.pop(name, {})
            methods[name] = (
                None if name == DENSE else build_method(name, layout, density=density, overrides=values, **amounts)
            )
        if overrides:
            raise BadInput(
                f"--set {next(iter(overrides))}: this method is not among those to run ({', '.join(names)})."
            )
        # --out is the video of the first method; of a comparison, that is the one after the reference.
        first = names[1] if compare else names[0]
        files = {name: out if name == first else out.with_name(f"{out.stem}.{name}.mp4") for name in names}
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        if not asked:
            typer.echo(f"method {', '.join(names)}: {why}")
        loading = {"offload": offload, "tiling": vae_tiling}
        warm = warm_up and compare
        videos = make_videos(facts, settings, methods, files, place, chosen_dtype, backend, warm, loading)
        if not compare:
            print_summary(videos, files)
            return
        of_vae = usual_autoencoder_dtype(facts.makes_any_size, chosen_dtype)
        described = {
            "model": f"{facts.name} ({facts.pipeline_class})",
            "methods": f"{', '.join(names)}: {why}",
            "negative prompt": settings.negative_prompt or "none",
            "steps": str(settings.steps),
            "guidance scale": f"{settings.guidance_scale:g}",
            "seed": str(settings.seed),
            "backend": backend,
            "dtype": f"{chosen_dtype}, autoencoder {of_vae}".replace("torch.", ""),
        }
        write_comparison(videos, files, settings, layout.tokens, described, environment(place), page)
