"""`vidaccel tune` finds the fastest preset within a budget; `vidaccel break-even` measures where sparse pays here."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import one_line_errors
from .options import Components, Device, Dtype, Offload, OffloadBlocks, Threads, Tiling, offloading, use_threads
from .terminal import command_line, console, page_line, printing, tell_before

if TYPE_CHECKING:
    from ..generation.tuning.result import Tuned


NOT_WITHIN = 3
"""Exit code where nothing is within the budget; 1 and 2 are failures, see `one_line_errors`."""


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("tune")(tune_command)
    app.command("break-even")(break_even_command)


def tune_command(
    prompt: Annotated[list[str] | None, typer.Argument(help="What a video shows; four to eight are enough.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file with a prompt on each line.")] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of preset.yaml, tune.html and the journal; made if missing.")
    ] = Path("tune"),
    model: Annotated[str, typer.Option(help='"demo" or "demo-dc", a folder of a pipeline, or a hub id.')] = "demo",
    components: Components = None,
    max_error: Annotated[
        float | None, typer.Option(help="Budget: relative error of a step against dense, such as 0.05.")
    ] = None,
    min_psnr: Annotated[
        float | None, typer.Option(help="Budget: dB to the dense videos, of their mean error, such as 30.")
    ] = None,
    max_time_ratio: Annotated[
        float | None,
        typer.Option(help="Budget: share of the dense time, such as 0.5; the preset nearest to dense is then sought."),
    ] = None,
    lever: Annotated[
        list[str] | None,
        typer.Option(
            help="sparse, cache, precision, quantize, compile, adapter or guidance; repeatable. (default: all of them)"
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Of sparse attention; repeatable. (default: tangent, svg2, sparge, radial)"),
    ] = None,
    cache: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable. (default: forecast, first_block, magcache, seacache, taylorseer, cache_dit)"),
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            help="Of guidance in one pass or few steps: a file, its folder, or that of its training; repeatable. "
            "(default: those beside the weights)"
        ),
    ] = None,
    effort: Annotated[str, typer.Option(help="quick, normal or thorough: how finely settings are tried.")] = "normal",
    confirm: Annotated[int, typer.Option(help="Candidates of which whole videos are made, at the most.")] = 6,
    negative_prompt: Annotated[str, typer.Option(help="What the videos should not show.")] = "",
    seed: Annotated[int, typer.Option(help="Of the first video; the others have the next ones.")] = 0,
    frames: Annotated[int | None, typer.Option(help="Frames. (default: the model's)")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels. (default: the model's)")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels. (default: the model's)")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. (default: the model's)")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is no guidance. (default: the model's)")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offload: Offload = False,
    offload_blocks: OffloadBlocks = False,
    vae_tiling: Tiling = False,
    threads: Threads = None,
) -> None:
    """Find the fastest preset within a budget, for a model, a size and a few prompts, on this machine.

    Called again with the same --out, it goes on where it was interrupted; another budget begins with what is known.
    The exit code is 3 where nothing is within the budget.
    """
    with one_line_errors(lambda: _kept(out), by_blocks=offload_blocks):
        from ..generation.requests.prompts import unknown_note
        from ..generation.tuning.api import PAGE, PRESET, tune
        from ..generation.tuning.result import FOUND, NOTHING
        from ..generation.tuning.space import CACHES, LEVERS, METHODS
        from .presets import built_in_prompts, lines_of

        use_threads(threads)
        texts = [*(prompt or ()), *lines_of(prompts)] or built_in_prompts(model)
        said = tell_before(unknown_note(model, *texts, negative_prompt))
        made = tune(
            model,
            texts,
            seed,
            out=out,
            max_error=max_error,
            min_psnr=min_psnr,
            max_time_ratio=max_time_ratio,
            levers=lever or LEVERS,
            methods=method or METHODS,
            caches=cache or CACHES,
            adapters=adapter or (),
            effort=effort,
            confirm=confirm,
            negative_prompt=negative_prompt,
            frames=frames,
            height=height,
            width=width,
            steps=steps,
            guidance_scale=guidance_scale,
            device=device,
            dtype=dtype,
            offload=offloading(offload, offload_blocks),
            tiling=vae_tiling,
            components=components,
        )
        where = page_line("page", out / PAGE)
        with printing(where):  # all is written already
            _print_table(made, said)
            typer.echo(where)
            if made.outcome == FOUND:
                typer.echo(f"preset: {out / PRESET} ({made.command})")
            typer.echo(made.in_words())
        if made.outcome == NOTHING:
            raise typer.Exit(NOT_WITHIN)


def _kept(out: Path) -> str:
    """What to say where `tune` was interrupted: what is kept, and how to go on with it."""
    from ..generation.tuning.journal import kept

    if not (count := kept(out)):
        return "Interrupted: nothing was measured yet."
    measured = f"{count} measurement{'s are' if count > 1 else ' is'} kept in {out}"
    return f"Interrupted: {measured}. The same command goes on from there:\n{command_line()}"


def break_even_command(
    model: Annotated[
        str | None, typer.Option(help='"demo" or "demo-dc", a folder of a pipeline, or a hub id. (default: demo)')
    ] = None,
    components: Components = None,
    heads: Annotated[
        int | None, typer.Option(help="Of self-attention, with --head-dim in place of a model: of a native one.")
    ] = None,
    head_dim: Annotated[int | None, typer.Option(help="Channels of each of --heads.")] = None,
    method: Annotated[str, typer.Option(help="Of sparse attention, as it is by default.")] = "tangent",
    seconds: Annotated[float, typer.Option(help="About as long as it may take.")] = 60.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
) -> None:
    """Measure from how many tokens sparse attention is faster than dense here, for the heads of a model.

    No weights are read. `vidaccel generate` and the ComfyUI nodes use what is found instead of 8,192 tokens.
    """
    with one_line_errors(with_models=heads is None):
        from rich.table import Table

        from ..generation.tuning.api import measured_break_even

        use_threads(threads)
        given = model is not None or heads is not None or head_dim is not None
        found, key, file = measured_break_even(
            model if given else "demo",
            heads=heads,
            head_dim=head_dim,
            method=method,
            seconds=seconds,
            device=device,
            dtype=dtype,
            components=components,
        )
        table = Table(box=None, padding=(0, 2, 0, 0))
        for title in ("tokens", "dense ms", f"{method} ms", "dense / sparse"):
            table.add_column(title, justify="right")
        for tokens, dense, sparse in sorted(found.points):
            table.add_row(f"{tokens:,}", f"{1000 * dense:.1f}", f"{1000 * sparse:.1f}", f"{dense / sparse:.2f}")
        console().print(table)
        typer.echo(f"{key.heads} heads of {key.head_dim}, {key.dtype}, {key.machine}")
        typer.echo(f"{found.in_words()} Kept in {file}.")


def _print_table(made: Tuned, said: Collection[str] = ()) -> None:
    """Print what was found, without the notes that were said before it."""
    from rich.table import Table

    from ..generation.report.page import format_psnr, format_seconds

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("preset", overflow="fold")
    for title in ("a video", "of dense", "PSNR", "error"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("why not", overflow="fold")
    table.add_row("dense", format_seconds(made.dense_seconds), "1.00", "–", "–", "the reference")
    for each in made.confirmed:
        own = each.confirmed
        cells = [format_seconds(own.median), f"{own.ratio:.2f}", format_psnr(own.mean_psnr), _error(own.error)]
        table.add_row(each.candidate.label, *cells, each.why or "chosen")
    console(whole=True).print(table)
    left = len(made.tried) - len(made.confirmed)
    if any(each.confirmed.gain for each in made.confirmed):
        typer.echo('"of dense" is by turns with dense where a preset was measured once more in them; "a video" is not.')
    if left:
        were = "was" if left == 1 else "were"
        typer.echo(f"{left} more {were} measured on single steps or predicted; the page says why each was dropped.")
    for note in [*made.notes, *(f"{name} is left out: {why}" for name, why in made.dropped.items())]:
        if note not in said:
            typer.echo(note)


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
