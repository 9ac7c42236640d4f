"""The commands about presets: `vidaccel presets` lists them, `vidaccel waterfall` measures one lever by lever."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..generation.errors import BadInput
from .errors import one_line_errors
from .options import Device, Dtype, Offload, OffloadBlocks, Threads, Tiling, offloading, use_threads
from .terminal import can_show, command_line, console, page_line, tell_before, then_printed

if TYPE_CHECKING:
    from ..generation.waterfall.account import Waterfall


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("presets")(presets_command)
    app.command("waterfall")(waterfall_command)


def presets_command(
    name: Annotated[str | None, typer.Argument(help="Print this one, or a file, as YAML.")] = None,
) -> None:
    """The presets that come with the package: for which model, and what they do."""
    with one_line_errors(with_models=False):
        import yaml
        from rich.table import Table

        from ..pipelines.presets import load_preset, shipped_presets
        from ..pipelines.presets.files import absolute

        if name is not None:
            # With whole paths, and escapes for what the output cannot show: what is printed may be put anywhere.
            content = absolute(load_preset(name)).to_dict()
            text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
            typer.echo(text if can_show(text) else yaml.safe_dump(content, sort_keys=False), nl=False)
            return
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        for number, each in enumerate(map(load_preset, shipped_presets())):
            if number:
                table.add_row()
            steps = {"steps": str(each.num_inference_steps)} if each.num_inference_steps else {}
            told = ", ".join(f"{lever} {text}" for lever, text in (each.levers() | steps).items())
            about = {"for": each.model or each.family, "what": each.summary, "levers": told}
            for line, (title, text) in enumerate(about.items()):
                table.add_row("" if line else each.name, title, text)
        console().print(table)


def waterfall_command(
    preset: Annotated[str, typer.Argument(help="A .yaml or .json file, or a name of `vidaccel presets`.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="What a video shows; repeatable. (default: 4 of the built-in models, for these)"),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file with a prompt on each line.")] = None,
    model: Annotated[
        str,
        typer.Option(show_default=False, help="The plain base: a name, folder or hub id. (default: the preset's)"),
    ] = "",
    seed: Annotated[int, typer.Option(help="Of the first video; the others have the next ones.")] = 0,
    rounds: Annotated[int, typer.Option(help="How often all is run: the spread of the rounds shows the noise.")] = 2,
    frames: Annotated[int | None, typer.Option(help="Frames. (default: each model's)")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels. (default: each model's)")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels. (default: each model's)")] = None,
    steps: Annotated[int | None, typer.Option(help="Of rows whose preset says nothing. (default: as above)")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Likewise.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offload: Offload = False,
    offload_blocks: OffloadBlocks = False,
    vae_tiling: Tiling = False,
    threads: Threads = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page; its numbers go beside it, as .json.")] = Path(
        "waterfall.html"
    ),
) -> None:
    """Seconds and error after each lever of PRESET is added to the plain base, all measured in one process."""
    with one_line_errors(arguments=("preset",), options=("prompt",), by_blocks=offload_blocks):
        from ..generation.levers.presets import request_preset
        from ..generation.outputs import check_file, check_files
        from ..generation.requests.local_files import local_files
        from ..generation.requests.prompts import unknown_note
        from ..generation.waterfall.api import waterfall
        from ..generation.waterfall.page import write_waterfall

        chosen = request_preset(preset)
        check_file("out", out, ".html")
        of_preset = [preset, chosen.decoder, chosen.model, chosen.base, *(lora.path for lora in chosen.loras)]
        read = local_files({"preset": of_preset, "prompts": prompts, "model": model})
        check_files("out", out, [out, out.with_suffix(".json")], read)
        use_threads(threads)
        texts = [*(prompt or ()), *lines_of(prompts)] or built_in_prompts(model or chosen.model)
        said = tell_before(unknown_note(model or chosen.base or chosen.model, *texts))
        made = waterfall(
            model or None,
            chosen,
            texts,
            seed,
            rounds=rounds,
            frames=frames,
            height=height,
            width=width,
            steps=steps,
            guidance_scale=guidance_scale,
            device=device,
            dtype=dtype,
            offload=offloading(offload, offload_blocks),
            tiling=vae_tiling,
        )
        with then_printed(lambda: _print_table(made, said), page_line("page", out)):
            write_waterfall(made, out, command_line())


def lines_of(file: Path | None) -> list[str]:
    """The prompts in a file, one a line; none without one.

    Raises:
        BadInput: it cannot be read, or has no prompt in it.
    """
    if file is None:
        return []
    try:
        # with or without the mark that Windows' editors put in front
        found = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise BadInput("prompts", f"it cannot be read ({why})", "Give a text file in UTF-8.", value=file) from error
    if not found:
        raise BadInput("prompts", "there is no prompt in it", "Write one a line.", value=file)
    return found


def built_in_prompts(model: str) -> list[str]:
    """Prompts that the built-in models can show, evenly spread over those that training never saw."""
    from ..demo import HELD_OUT_PROMPTS
    from ..generation.models.places import DEMOS

    if model not in DEMOS:
        raise BadInput("prompt", "is needed for this model", "Give one, or several.")
    return [HELD_OUT_PROMPTS[i * len(HELD_OUT_PROMPTS) // 4] for i in range(4)]


def _print_table(made: Waterfall, said: Collection[str] = ()) -> None:
    """Print what was found, without the notes that were said before it."""
    from rich.table import Table

    from ..generation.report.page import OVER_WHAT_DIFFERS, format_psnr, format_seconds
    from ..generation.waterfall.page import row_name, row_notes

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("lever", overflow="fold")
    checked = made.rows[0].right is not None
    for title in ("a video", "base/this", "rounds", "PSNR", *(("right",) if checked else ()), "passes"):
        table.add_column(title, justify="right", no_wrap=True)
    for number, row in enumerate(made.rows):
        low, high = made.gain_range(row)
        cells = [f"{row_name(row, number)}: {row.stage.text if number else row.stage.model}"]
        cells += [format_seconds(row.median), f"{made.gain(row):.2f}", f"{low:.2f}-{high:.2f}" if number else "–"]
        cells += [format_psnr(row.mean_psnr, row.identical_frames) if number else "–"]
        cells += [f"{sum(row.right)}/{len(row.right)}"] if checked else []
        computed, skipped = row.forwards
        halved = f", {row.halved:g} halved" if made.halves else ""
        table.add_row(*cells, f"{computed:g} of {computed + skipped:g}{halved}")
    console(whole=True).print(table)
    if made.leaves_out:
        typer.echo(OVER_WHAT_DIFFERS)
    for note in [*made.notes, *(f"{name}: {note}." for name, note in row_notes(made.rows))]:
        if note not in said:
            typer.echo(note)
    typer.echo(made.in_words())
