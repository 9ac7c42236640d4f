"""The commands that make models: `vidaccel convert` and `vidaccel adapt`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import check_writable, refuse_given
from .user_errors import BadInput, first_line, one_line_errors


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("convert")(convert_command)
    app.command("adapt")(adapt_command)


def convert_command(
    source: Annotated[
        Path,
        typer.Argument(help="A published DC-AE-V file, a published DC-VideoGen folder, or an AutoencoderDCV folder."),
    ],
    target: Annotated[Path, typer.Argument(help="A new folder; a new .pt or .safetensors for the way back.")],
    image_to_video: Annotated[
        bool, typer.Option("--image-to-video", help="Of a published folder, take the image-to-video model.")
    ] = False,
    autoencoder: Annotated[
        Path | None, typer.Option(help="DC-AE-V file or folder, where the published folder has none.")
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
        if not source.exists():
            raise BadInput(f"There is no file or folder {source}.")
        if target.exists():
            raise BadInput(f"{target} exists already: give a new name, or delete it first.")
        way_back = target.suffix in (".pt", ".safetensors")
        of_folder = {
            "--image-to-video": image_to_video,
            "--autoencoder": autoencoder is not None,
            "--base": base is not None,
            "--link": link,
        }
        of_file = {"--chunk-size": chunk_size is not None, "--scaling-factor": scaling_factor is not None}
        if way_back:
            refuse_given(of_folder | of_file, f"of no use when an AutoencoderDCV is written as {target.name}:")
        elif source.is_dir():
            refuse_given(of_file, f"only for a DC-AE-V file as SOURCE, and {source} is a folder:")
        else:
            refuse_given(of_folder, f"only for a published folder as SOURCE, and {source} is a file:")
        check_writable(str(target), target.parent)
        if way_back:
            _write_published(source, target)
        elif source.is_dir():
            from .pipelines.published import convert_repository

            name = "DCVideoGenImageToVideoPipeline" if image_to_video else "DCVideoGenPipeline"
            convert_repository(source, target, name, autoencoder=autoencoder, base=base, link=link)
        else:
            changes = {"chunk_size": chunk_size, "scaling_factor": scaling_factor}
            _write_autoencoder(source, target, {name: value for name, value in changes.items() if value is not None})
        typer.echo(f"Wrote {target}")


def _write_autoencoder(source: Path, target: Path, changes: dict[str, Any]) -> None:
    """A published file as the folder of an `AutoencoderDCV`."""
    from .autoencoders.convert import CheckpointError, load_published
    from .pipelines.published import beside

    try:
        model = load_published(source, **changes)
    except CheckpointError:
        raise
    except ValueError as error:
        raise BadInput(f"{source} cannot be converted: {first_line(error)}") from error
    with beside(target) as draft:
        model.save_pretrained(draft)


def _write_published(source: Path, target: Path) -> None:
    """The way back: an `AutoencoderDCV` folder as one published file."""
    import torch
    from safetensors.torch import save_file

    from .autoencoders import AutoencoderDCV
    from .autoencoders.convert import CheckpointError, to_published

    if not (source / "config.json").is_file():
        why = "it has no config.json" if source.is_dir() else "it is a file"
        raise CheckpointError(f"{source} is no folder of an AutoencoderDCV: {why}.")
    try:
        model = AutoencoderDCV.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source} cannot be loaded as an AutoencoderDCV: {error}") from error
    state = {name: value.contiguous() for name, value in to_published(model.state_dict(), model.config).items()}
    draft = target.with_name(f".{target.name}.{os.getpid()}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if target.suffix == ".safetensors":
            save_file(state, draft)
        else:
            torch.save({"model_state_dict": state}, draft)
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


def adapt_command(
    recipe: Annotated[str, typer.Argument(help="autoencoder, or ae-adapt.")] = "",
    config: Annotated[str, typer.Option(help="YAML file, or the name of a ready one (see --list).")] = "",
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting: phases.lora.steps=2000; repeatable.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(help="latest, auto (latest if there is one), or the folder of a checkpoint.")
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="List the ready settings and end.")] = False,
) -> None:
    """Adapt a model to another autoencoder, or train an autoencoder.

    On several GPUs: accelerate launch -m vidaccel.lora RECIPE --config FILE.
    """
    with one_line_errors():
        from . import lora
        from .lora.config import ConfigError

        if show:
            for file in sorted(lora.config_folder().glob("*.yaml")):
                typer.echo(f"{file.stem}: {file.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")
            return
        if not recipe:
            raise ConfigError("the recipe is missing: give autoencoder or ae-adapt.")
        if not config:
            raise ConfigError("--config is missing: give a YAML file, or the name of a ready one (--list).")
        from .lora.__main__ import main

        arguments = [recipe.replace("-", "_"), "--config", config]
        arguments += [part for text in change or [] for part in ("--set", text)]
        arguments += ["--resume", resume] if resume else []
        code = main(arguments)
        if code:
            raise typer.Exit(code)
