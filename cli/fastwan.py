"""`vidaccel convert fastwan`: parsing and messages; the work is elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..generation.errors import BadInput, refuse_given
from ..generation.outputs import check_writable
from .errors import one_line_errors


def fastwan_command(
    source: Annotated[
        str, typer.Argument(help="Folder or hub id of a FastWan model (FastVideo/FastWan2.1-T2V-1.3B-Diffusers).")
    ],
    target: Annotated[Path, typer.Argument(help="A new folder; a new .safetensors for ComfyUI.")],
    density: Annotated[
        float | None,
        typer.Option(
            help="Of its sparse attention (VSA), 1 - sparsity. (default: what SOURCE states, or else 0.2 for "
            "1.3B and 5B, 0.1 for 14B, as FastVideo's scripts have it)"
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub id: a branch, a tag or a commit.")] = None,
    link: Annotated[bool, typer.Option("--link", help="Link files instead of copying them.")] = False,
) -> None:
    """Convert a FastWan model (3 steps, Video Sparse Attention) to a folder of diffusers, or to one file for ComfyUI.

    Every key and shape is checked before anything is written.
    """
    with one_line_errors():
        from ..pipelines.files.locations import is_hub_id

        if not Path(source).expanduser().is_dir() and not is_hub_id(source):
            problem = "it is neither a folder here nor a hub id of the form owner/name"
            raise BadInput("source", problem, value=source)
        if target.exists():
            raise BadInput("target", "it exists already", "Give a new name, or delete it first.", value=target)
        if target.suffix == ".safetensors":
            refuse_given({"link": link}, f"of no use for {target.name}, one file, which is written")
        if density is not None and not 0 < density <= 1:
            raise BadInput("density", "it must be above 0 and at most 1", value=density)
        if revision is not None and Path(source).expanduser().is_dir():
            raise BadInput("revision", "is for a hub id, and SOURCE is a folder here", "Leave it out.", value=revision)
        check_writable("target", target)
        from ..pipelines.few_steps.fastwan import convert_fastwan

        convert_fastwan(source, target, density=density, revision=revision, link=link)
        typer.echo(f"Wrote {target}")
