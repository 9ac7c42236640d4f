"""`vidaccel convert turbowan`: parsing and messages; the work is elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..generation.errors import BadInput
from ..generation.outputs import check_writable
from .errors import one_line_errors


def turbowan_command(
    source: Annotated[
        Path,
        typer.Argument(
            help="A TurboDiffusion file (.pth, .safetensors), or a folder of a transformer or a pipeline; of Wan 2.2 "
            "the model for high noise."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="A new folder.")],
    low_noise: Annotated[Path | None, typer.Option(help="Of Wan 2.2, the model for low noise.")] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Wan pipeline (folder or hub id) with text encoder, tokenizer, autoencoder. (default: SOURCE, where "
            "it has them; otherwise the published model of the same size)"
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="net or net_ema, of a checkpoint of a training that has both.")
    ] = None,
    ode: Annotated[
        bool, typer.Option("--ode", help="Sample with the noise of the start alone: sharper and less robust.")
    ] = False,
    link: Annotated[
        bool, typer.Option("--link", help="Link the components of the base instead of copying them.")
    ] = False,
) -> None:
    """Convert a TurboDiffusion checkpoint (4 steps, sparse-linear attention) to a folder of diffusers.

    Every key is used once and shapes are checked before anything is written.
    """
    with one_line_errors():
        for field, place in (("source", source), ("low_noise", low_noise)):
            if place is not None and not place.exists():
                raise BadInput(field, "there is no such file or folder", "Download it first.", value=place)
        if target.exists():
            raise BadInput("target", "it exists already", "Give a new name, or delete it first.", value=target)
        if weights not in (None, "net", "net_ema"):
            raise BadInput("weights", "it must be net or net_ema", value=weights)
        check_writable("target", target)
        from ..pipelines.few_steps.turbowan import convert_turbowan

        convert_turbowan(source, target, low_noise=low_noise, base=base, weights=weights, ode=ode, link=link)
        typer.echo(f"Wrote {target}")
