"""The commands that make models: `vidaccel convert` and `vidaccel adapt`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..generation.errors import BadInput, mention, refuse_given
from ..generation.outputs import check_writable
from .errors import one_line_errors
from .fastwan import fastwan_command
from .turbowan import turbowan_command

_FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    convert = typer.Typer(cls=_Convert, no_args_is_help=True)
    convert.command("dc-videogen")(convert_command)
    convert.command("turbowan")(turbowan_command)
    convert.command("fastwan")(fastwan_command)
    app.add_typer(convert, name="convert", help="Convert published weights; dc-videogen where none is named.")
    app.command("adapt")(adapt_command)
    app.command("train", hidden=True)(adapt_command)  # what one may try first


class _Convert(TyperGroup):
    """`convert SOURCE TARGET` is `convert dc-videogen SOURCE TARGET`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["dc-videogen", *args]
        return super().parse_args(ctx, args)


def convert_command(
    source: Annotated[
        Path,
        typer.Argument(
            help="A published DC-AE-V file; a published DC-VideoGen folder or hub id; an AutoencoderDCV folder."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="A new folder; a new .pt or .safetensors for the way back.")],
    image_to_video: Annotated[
        bool, typer.Option("--image-to-video", help="Of a published folder, take the image-to-video model.")
    ] = False,
    autoencoder: Annotated[
        Path | None, typer.Option(help="DC-AE-V file, folder or hub id, where the published folder has none.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Wan pipeline (folder or hub id) that has what the published folder lacks.")
    ] = None,
    link: Annotated[bool, typer.Option("--link", help="Link what needs no conversion instead of copying it.")] = False,
    chunk_size: Annotated[
        int | None, typer.Option(help="Of a DC-AE-V file that is none of the published, what its weights do not tell.")
    ] = None,
    scaling_factor: Annotated[float | None, typer.Option(help="Likewise: 1 / deviation of its latents.")] = None,
) -> None:
    """Convert published DC-VideoGen weights to diffusers, or an autoencoder back.

    Every key is used once and shapes are checked before weights are read.
    """
    with one_line_errors():
        way_back = target.suffix in (".pt", ".safetensors")
        if not source.exists() and (way_back or not _may_be_on_the_hub(source)):
            also = "" if way_back else ", and it is no hub id of the form owner/name"
            raise BadInput("source", f"there is no such file or folder{also}", value=source)
        if target.exists():
            raise BadInput("target", "it exists already", "Give a new name, or delete it first.", value=target)
        of_folder = {
            "image_to_video": image_to_video,
            "autoencoder": autoencoder is not None,
            "base": base is not None,
            "link": link,
        }
        of_file = {"chunk_size": chunk_size is not None, "scaling_factor": scaling_factor is not None}
        if way_back:
            refuse_given(of_folder | of_file, f"of no use when an AutoencoderDCV is written as {target.name}")
        elif source.is_file():
            refuse_given(of_folder, f"only for a published folder as {mention('source')}, and {source} is a file")
        check_writable("target", target)
        changes = {"chunk_size": chunk_size, "scaling_factor": scaling_factor}
        changes = {name: value for name, value in changes.items() if value is not None}
        if way_back:
            from ..autoencoders.convert import write_published_file

            write_published_file(source, target)
        elif source.is_file():
            _write_autoencoder(source, target, changes)
        else:
            name = "DCVideoGenImageToVideoPipeline" if image_to_video else "DCVideoGenPipeline"
            without = () if autoencoder is None else ("vae",)
            folder = source if source.is_dir() else _fetch(str(source), name, without)
            alone = _only_autoencoder(folder)
            if alone is None:
                parts = {"autoencoder": autoencoder, "base": base}
                _write_pipeline(str(source), folder, target, name, parts, changes, link)
            else:
                refuse_given(
                    of_folder, f"only for a whole model as {mention('source')}, and {source} has just {alone.name}"
                )
                _write_autoencoder(alone, target, changes)
        typer.echo(f"Wrote {target}")


def _may_be_on_the_hub(source: Path) -> bool:
    from ..pipelines.files.locations import is_hub_id

    return is_hub_id(str(source)) and source.suffix.lower() not in _FILES


def _fetch(location: str, pipeline_class: str, without: Collection[str]) -> Path:
    from ..pipelines.deep_compression.published_hub import fetch_published

    typer.echo(f"{location} is no folder here: fetching it from the hub, as far as it was not before.")
    return fetch_published(location, pipeline_class, without)


def _only_autoencoder(folder: Path) -> Path | None:
    from ..pipelines.deep_compression.published_parts import only_autoencoder

    return only_autoencoder(folder)


def _write_pipeline(
    location: str,
    folder: Path,
    target: Path,
    pipeline_class: str,
    parts: dict[str, Any],
    changes: dict[str, Any],
    link: bool,
) -> None:
    """A published folder as one of diffusers."""
    from ..pipelines.deep_compression.published import convert_repository
    from ..pipelines.deep_compression.published_hub import known_parts

    for name, value in known_parts(location, folder, **parts).items():
        typer.echo(f"No --{name} is given, so it is {value}.")
        parts = {**parts, name: value}
    convert_repository(folder, target, pipeline_class, **parts, link=link, autoencoder_config=changes)


def _write_autoencoder(source: Path, target: Path, changes: dict[str, Any]) -> None:
    """A published file as the folder of an `AutoencoderDCV`."""
    from ..autoencoders.convert import CheckpointError, load_published
    from ..pipelines.errors import first_line
    from ..pipelines.files.drafts import beside

    try:
        model = load_published(source, **changes)
    except CheckpointError:
        raise
    except ValueError as error:
        raise BadInput("source", f"it cannot be converted ({first_line(error)})", value=source) from error
    with beside(target) as draft:
        model.save_pretrained(draft)


def adapt_command(
    recipe: Annotated[
        str, typer.Argument(help="lora, length, gft, consistency, sla, ae-adapt, autoencoder, or tiny-decoder.")
    ] = "",
    config: Annotated[str, typer.Option(help="YAML file, or the name of a ready one (see --list).")] = "",
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting: phases.lora.steps=2000; repeatable.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(help="latest, auto (latest if there is one), or the folder of a checkpoint.")
    ] = None,
    encode_only: Annotated[
        bool, typer.Option("--encode-only", help="Fill the caches of clips and captions (data.cache), and end.")
    ] = False,
    show: Annotated[bool, typer.Option("--list", help="List the ready settings and end.")] = False,
) -> None:
    """Train a LoRA, adapt a model to another autoencoder, or train an autoencoder or a tiny decoder.

    On several GPUs: accelerate launch -m vidaccel.lora RECIPE --config FILE.
    """
    with one_line_errors():
        from .. import lora
        from ..lora.config import ConfigError
        from ..lora.recipes import find

        if show:
            for file in sorted(lora.config_folder().glob("*.yaml")):
                typer.echo(f"{file.stem}: {_summary(file.read_text(encoding='utf-8'))}")
            return
        if not recipe:
            raise ConfigError(
                "the recipe is missing: give lora, length, gft, consistency, sla, ae-adapt, autoencoder or "
                "tiny-decoder."
            )
        find(recipe)  # a name that there is not is the first fault
        if not config:
            raise ConfigError("--config is missing: give a YAML file, or the name of a ready one (--list).")
        from ..lora.__main__ import main

        arguments = [recipe.replace("-", "_"), "--config", config]
        arguments += [part for text in change or [] for part in ("--set", text)]
        arguments += ["--resume", resume] if resume else []
        arguments += ["--encode-only"] if encode_only else []
        code = main(arguments)
        if code:
            raise typer.Exit(code)


def _summary(settings: str) -> str:
    """The whole sentences at the beginning of a file of settings, before where they are explained."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), settings.splitlines())
    told = " ".join(line.strip("# ") for line in lines).partition("Every setting")[0]
    return re.match(r".*\.(?= |$)", told.strip())[0]
