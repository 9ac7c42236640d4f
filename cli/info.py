"""The commands that tell: `vidaccel methods` and `vidaccel info`."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any

import typer

from ..generation.errors import mention, refuse_given
from .errors import one_line_errors
from .options import Components, pipeline_arguments
from .terminal import console


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("methods")(methods_command)
    app.command("info")(info_command)


def methods_command(
    families: Annotated[
        bool, typer.Option("--families", help="Instead: the model families that they work on.")
    ] = False,
) -> None:
    """What each method does, what it is good for and what it costs; or which models they work on."""
    from rich.table import Table

    if families:
        with one_line_errors():
            _print_families()
        return
    from ..attention import METHODS
    from ..generation.levers.methods import DEFAULT_METHOD, DENSE, MIN_SPARSE_TOKENS

    table = Table(show_header=False, show_lines=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    by_default = {
        DENSE: f"for a video of fewer than {MIN_SPARSE_TOKENS} tokens",
        DEFAULT_METHOD: f"for a video of at least {MIN_SPARSE_TOKENS} tokens",
    }
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
        if name in by_default:
            about["by default"] = by_default[name]
        for line, (title, text) in enumerate(about.items()):
            table.add_row("" if line else name, title, text)
    console().print(table)


def _print_families() -> None:
    from rich.table import Table

    from ..pipelines.acceleration.families import NOT_SERVED
    from ..pipelines.acceleration.support import support_rows

    shown = console()
    # One below the other: side by side, names of pipelines would be cut to what is the same in all of them.
    for row in support_rows():
        (_, family), *about = row.items()
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True, min_width=max(len(title) for title, _ in about))
        table.add_column(overflow="fold")
        for title, text in about:
            table.add_row(title, text)
        shown.print(family, style="bold", highlight=False)
        shown.print(table)
        shown.print()
    for name, why in NOT_SERVED.items():
        shown.print(f"not {name}: {why}")


def info_command(
    forecast: Annotated[
        bool,
        typer.Option("--forecast", help="Instead: tokens and rough memory of a video, before any weights are read."),
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="With --forecast: the model, as for generate. (default: demo)")
    ] = None,
    components: Components = None,
    frames: Annotated[int | None, typer.Option(help="With --forecast. (default: the model's)")] = None,
    height: Annotated[int | None, typer.Option(help="With --forecast. (default: the model's)")] = None,
    width: Annotated[int | None, typer.Option(help="With --forecast. (default: the model's)")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="With --forecast: of the weights at work. (default: bfloat16)")
    ] = None,
    pipeline_option: Annotated[
        list[str] | None, typer.Option(help="With --forecast: ARGUMENT=VALUE, as for generate; repeatable.")
    ] = None,
) -> None:
    """Versions, devices, and which backends can run here; or what a video will take."""
    with one_line_errors(with_models=forecast):
        if forecast:
            options = pipeline_arguments(pipeline_option or [])
            _print_forecast(model or "demo", components, frames, height, width, dtype or "bfloat16", options)
            return
        values = {"model": model, "components": components, "frames": frames, "height": height, "width": width}
        values |= {"dtype": dtype, "pipeline_options": pipeline_option}
        given = {field: value is not None for field, value in values.items()}
        refuse_given(given, f"of use only together with {mention('forecast')}")
        _print_machine()


def _print_machine() -> None:
    import torch
    from rich.table import Table

    from ..attention.backends import BACKENDS
    from ..generation.machine import environment

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = [torch.device("cpu"), *([accelerator] if accelerator is not None else [])]
    versions = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for key, value in environment(devices[-1]).items():
        versions.add_row(key, value)
    if accelerator is None:
        versions.add_row("GPU", "none that torch can use")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("backend", *(f"on {d.type}" for d in devices), "can do"):
        table.add_column(title)
    for name, backend in BACKENDS.items():
        table.add_row(name, *(backend.unavailable(d) or "yes" for d in devices), backend.describe())
    shown = console()
    shown.print(versions)
    shown.print()
    shown.print(table)


def _print_forecast(
    model: str,
    components: str | None,
    frames: int | None,
    height: int | None,
    width: int | None,
    dtype: str,
    options: dict[str, Any],
) -> None:
    import torch
    from rich.table import Table

    from ..generation.forecast import forecast
    from ..generation.machine import choose_dtype
    from ..generation.models.inspected import inspect_model
    from ..generation.models.single_file import whole_model
    from ..generation.requests.pipeline_options import check_options
    from ..generation.requests.settings import Settings

    model = whole_model(model, components)
    facts = inspect_model(model)
    check_options(options, facts.row)
    settings = Settings("a forecast", frames=frames, height=height, width=width, pipeline_options=options)
    itemsize = choose_dtype(dtype, torch.device("cpu"), model).itemsize
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in forecast(facts, settings.sized(facts), itemsize):
        table.add_row(name, text)
    console().print(table)
