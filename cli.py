"""The command line: `vidaccel generate`, `methods` and `info`; `convert` and `adapt` are in `model_commands`.

Parsing and messages; the work is elsewhere.
"""

from __future__ import annotations

import ast
import contextlib
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import model_commands

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress

    from .attention.methods.base import Method
    from .report import Comparison, GeneratedVideo
    from .request import ModelFacts, Settings

DENSE = "dense"
DEFAULT_METHODS = ("svg2",)
DEFAULT_COMPARED = ("svg2", "radial", "svg")

app = typer.Typer(
    help="Faster pre-trained video diffusion models: sparse attention, and deep-compression autoencoders.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
model_commands.register(app)


def main() -> None:
    """The entry point of the `vidaccel` command."""
    # Before torch is imported: OpenMP threads that spin between small operations make a small model many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app(prog_name="vidaccel")


@app.command("generate")
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
            help="dense, radial, svg, svg2 (see `vidaccel methods`); repeatable. "
            "(default: svg2; with --compare: svg2, radial, svg)"
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
    with _plain_errors():
        from .generation import environment
        from .request import BadInput, Settings, build_method, check_backend, choose_device, choose_dtype, inspect_model

        # What needs no import of torch is checked first, what needs the model's configs last; no weights are read yet.
        settings = Settings(prompt, negative_prompt, frames, height, width, steps, guidance_scale, seed, fps, image)
        page = report if report is not None else out.with_name("report.html")
        _check_file("--out", out, ".mp4")
        if compare:
            _check_file("--report", page, ".html")
        elif report is not None:
            raise BadInput("--report is the page of --compare: give both.")
        if density is not None and not 0 < density <= 1:
            raise BadInput(f"--density is {density}: it must be above 0 and at most 1 (1 is dense).")
        if threads is not None and threads < 1:
            raise BadInput(f"--threads is {threads}: it must be at least 1.")
        amounts = {
            "dense_steps": _amount("--dense-steps", dense_steps),
            "dense_layers": _amount("--dense-layers", dense_layers),
        }
        overrides = _overrides(setting or [])
        names = _methods(method, compare)
        if density is not None and set(names) == {DENSE}:
            raise BadInput("--density needs a sparse method: add --method svg2, for example.")
        place = choose_device(device, offload)
        chosen_dtype = choose_dtype(dtype, place, model)
        check_backend(backend, place, sparse=any(name != DENSE for name in names))
        facts = inspect_model(model)
        settings = settings.checked(facts)
        layout = facts.layout(settings.frames, settings.height, settings.width)
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
        files = {
            name: out if name == _first(names, compare) else out.with_name(f"{out.stem}.{name}.mp4") for name in names
        }
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        videos = _run(
            facts,
            settings,
            methods,
            files,
            place,
            chosen_dtype,
            backend,
            warm_up and compare,
            {"offload": offload, "tiling": vae_tiling},
        )
        if not compare:
            _print_summary(videos, files)
            return
        described = {
            "model": f"{facts.name} ({facts.pipeline_class})",
            "negative prompt": settings.negative_prompt or "none",
            "steps": str(settings.steps),
            "guidance scale": f"{settings.guidance_scale:g}",
            "seed": str(settings.seed),
            "backend": backend,
            "dtype": f"{str(chosen_dtype).removeprefix('torch.')}, autoencoder float32",
        }
        _write_comparison(videos, files, settings, layout.tokens, described, environment(place), page)


@app.command("methods")
def methods_command() -> None:
    """What each method does, what it is good for and what it costs."""
    from rich.console import Console
    from rich.table import Table

    from .attention import METHODS

    table = Table(show_header=False, show_lines=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    rows = [(DENSE, {"does": "nothing: the pipeline as it is", "good for": "a reference to compare with"})]
    for name, method_class in METHODS.items():
        method = method_class()
        defaults = [f"{f.name}={getattr(method, f.name)!r}" for f in fields(method) if f.name != "schedule"]
        schedule = [f"{f.name}={v!r}" for f in fields(method.schedule) if (v := getattr(method.schedule, f.name))]
        about = {"does": method.summary, "good for": method.good_for, "costs": method.costs, "source": method.source}
        about["settings"] = ", ".join(defaults) or "none"
        about["stays dense"] = ", ".join(schedule) or "nowhere"
        rows.append((name, about))
    for index, (name, about) in enumerate(rows):
        if index:
            table.add_row()
        for line, (title, text) in enumerate(about.items()):
            table.add_row("" if line else name, title, text)
    Console().print(table, markup=False)


@app.command("info")
def info_command(
    plan: Annotated[
        bool, typer.Option("--plan", help="Instead: tokens and rough memory of a video, before any weights are read.")
    ] = False,
    model: Annotated[str, typer.Option(help="With --plan: the model, as for generate.")] = "demo",
    frames: Annotated[int | None, typer.Option(help="With --plan. (default: the model's)")] = None,
    height: Annotated[int | None, typer.Option(help="With --plan. (default: the model's)")] = None,
    width: Annotated[int | None, typer.Option(help="With --plan. (default: the model's)")] = None,
    dtype: Annotated[str, typer.Option(help="With --plan: of the weights at work.")] = "bfloat16",
) -> None:
    """Versions, devices, and which backends can run here; or what a video will take."""
    if plan:
        with _plain_errors():
            _print_plan(model, frames, height, width, dtype)
        return
    import torch
    from rich.console import Console
    from rich.table import Table

    from .attention.backends import BACKENDS
    from .generation import environment

    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    versions = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for key, value in environment(devices[-1]).items():
        versions.add_row(key, value)
    if not torch.cuda.is_available():
        versions.add_row("GPU", "none that torch can use")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("backend", *(f"on {d.type}" for d in devices), "can do"):
        table.add_column(title)
    for name, backend in BACKENDS.items():
        table.add_row(name, *(backend.unavailable(d) or "yes" for d in devices), backend.describe())
    console = Console()
    console.print(versions)
    console.print()
    console.print(table)


def _print_plan(model: str, frames: int | None, height: int | None, width: int | None, dtype: str) -> None:
    import torch
    from rich.console import Console
    from rich.table import Table

    from .plan import plan
    from .request import Settings, choose_dtype, inspect_model

    facts = inspect_model(model)
    settings = Settings("a plan", frames=frames, height=height, width=width)
    itemsize = choose_dtype(dtype, torch.device("cpu"), model).itemsize
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in plan(facts, settings.sized(facts), itemsize):
        table.add_row(name, text)
    Console().print(table)


# -- checks ------------------------------------------------------------------------------------------------------------


def _check_file(option: str, path: Path, suffix: str) -> None:
    from .request import BadInput

    if path.suffix.lower() != suffix:
        raise BadInput(f"{option} {path}: the name must end in {suffix}, the only format written.")
    if path.is_dir():
        raise BadInput(f"{option} {path} is a folder: give the name of a file in it.")
    if not path.parent.is_dir():
        raise BadInput(f"{option} {path}: there is no folder {path.parent}; create it first.")
    try:
        # Asking the system for its permission bits misses read-only file systems; a file says it for certain.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise BadInput(f"{option} {path}: the folder {path.parent} is not writable ({error.strerror}).") from error


def _amount(option: str, text: str | None) -> int | float | None:
    """A count ("4") or a fraction ("0.2")."""
    from .request import BadInput

    if text is None:
        return None
    with contextlib.suppress(ValueError):
        value = int(text) if text.lstrip("+-").isdigit() else float(text)
        if (isinstance(value, int) and value >= 0) or (isinstance(value, float) and 0 <= value <= 1):
            return value
    raise BadInput(f"{option} is {text}: give a count (a whole number from 0) or a fraction (0.0 to 1.0).")


def _overrides(texts: list[str]) -> dict[str, dict[str, Any]]:
    """`["svg2.top_p=0.8"]` -> `{"svg2": {"top_p": 0.8}}`."""
    from .request import BadInput

    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        target, equals, value = text.partition("=")
        method, dot, field = target.strip().partition(".")
        if not (equals and dot and method and field):
            raise BadInput(f"--set {text}: write METHOD.SETTING=VALUE, such as svg2.top_p=0.85.")
        try:
            found.setdefault(method, {})[field] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            # A bare word, as in rule=published.
            found.setdefault(method, {})[field] = value.strip()
    return found


def _methods(asked: list[str] | None, compare: bool) -> list[str]:
    """The runs in their order: dense first where it is the reference, every name once."""
    from .attention import METHODS
    from .request import BadInput

    names = list(dict.fromkeys(asked or (DEFAULT_COMPARED if compare else DEFAULT_METHODS)))
    for name in names:
        if name != DENSE and name not in METHODS:
            raise BadInput(f"--method {name} is unknown; known: {', '.join([DENSE, *METHODS])}.")
    if not compare:
        return names
    if names == [DENSE]:
        raise BadInput("--compare needs a method other than dense, which is always the reference.")
    return [DENSE, *(name for name in names if name != DENSE)]


def _first(names: list[str], compare: bool) -> str:
    """The run whose video gets the name of --out."""
    return names[1] if compare else names[0]


# -- running -----------------------------------------------------------------------------------------------------------


def _run(
    facts: ModelFacts,
    settings: Settings,
    methods: dict[str, Method | None],
    files: dict[str, Path],
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    warm: bool,
    loading: dict[str, bool],
) -> list[GeneratedVideo]:
    """Make every video and write each as soon as it is there, so that Ctrl-C in a later run loses nothing."""
    from .generation import generate, load, warm_up
    from .video import write_mp4

    videos = []
    with _progress() as progress:
        wait = progress.add_task(f"loading {facts.name}", total=None)
        pipe = load(facts, dtype, device, **loading)
        progress.remove_task(wait)
        for name, method in methods.items():
            task = progress.add_task(f"{name}: warm-up" if warm else name, total=settings.steps)
            warm_seconds = warm_up(pipe, settings, method, backend=backend) if warm else None
            progress.reset(task, description=name)

            def advance(done: int, total: int, task: Any = task, name: str = name) -> None:
                progress.update(task, completed=done, description=name if done < total else f"{name}: decoding")

            video = generate(pipe, settings, name, method, backend=backend, on_step=advance)
            progress.update(task, description=name)
            progress.stop_task(task)
            write_mp4(video.frames, files[name], settings.fps)
            videos.append(replace(video, warm_up_seconds=warm_seconds))
    return videos


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _write_comparison(
    videos: list[GeneratedVideo],
    files: dict[str, Path],
    settings: Settings,
    tokens: int,
    described: dict[str, str],
    machine: dict[str, str],
    page: Path,
) -> None:
    from .report import Comparison, contact_sheet_png, write_html, write_json
    from .video import write_bytes

    comparison = Comparison(
        prompt=settings.prompt,
        videos=tuple(videos),
        files=tuple(files[v.name] for v in videos),
        fps=settings.fps,
        tokens=tokens,
        settings=described,
        environment=machine,
        command=shlex.join(["vidaccel", *sys.argv[1:]]),
    )
    write_json(comparison, page.with_suffix(".json"))
    write_bytes(contact_sheet_png(comparison), page.with_suffix(".png"))
    write_html(comparison, page)
    _print_summary(videos, files, comparison)
    typer.echo(f"comparison: {page} (open it in a browser); numbers: {page.with_suffix('.json')}")


def _print_summary(videos: list[GeneratedVideo], files: dict[str, Path], comparison: Comparison | None = None) -> None:
    from rich.console import Console
    from rich.table import Table

    from .report import format_psnr, format_seconds

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("method")
    for title in ("time", "density", *(("PSNR", "SSIM") if comparison else ())):
        table.add_column(title, justify="right")
    table.add_column("file", overflow="fold")
    for video in videos:
        density = "100 %" if video.report is None else f"{100 * video.report.mean_density():.0f} %"
        row = [video.name, format_seconds(video.seconds), density]
        if comparison:
            metrics = comparison.metrics.get(video.name)
            row += [format_psnr(metrics.mean_psnr), f"{metrics.mean_ssim:.3f}"] if metrics else ["–", "–"]
        table.add_row(*row, str(files[video.name]))
    Console().print(table)


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Errors that a user can act on become one line: exit 2 for bad input, 1 for a failed run, 130 for Ctrl-C."""
    from .generation import GenerationError
    from .request import BadInput
    from .video import EncodingError

    def terminate(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    # Without this, SIGTERM ends the process at once and leaves the temporary file of a half-written video.
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except BadInput as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("Interrupted: what was at work was not written.", err=True)
        raise typer.Exit(130) from None
    except (GenerationError, EncodingError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        typer.echo("Error: out of GPU memory: try --offload, fewer --frames or a smaller size.", err=True)
        raise typer.Exit(1) from None
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
