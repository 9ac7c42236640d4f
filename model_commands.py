"""The commands that make models: `vidaccel convert` and `vidaccel adapt`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("convert")(convert_command)
    app.command("adapt")(adapt_command)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """What a user can act on becomes one line: exit 2 for bad input, 1 for a failed write, 130 when asked to stop."""
    try:
        yield
    except ValueError as error:
        if type(error).__module__.partition(".")[0] != "vidaccel":
            raise
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    except OSError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("Interrupted: nothing was left half written.", err=True)
        raise typer.Exit(130) from None


def convert_command(
    source: Annotated[
        Path,
        typer.Argument(help="A published DC-AE-V file, a published DC-VideoGen folder, or an AutoencoderDCV folder."),
    ],
    target: Annotated[Path, typer.Argument(help="A new folder; a new .pt or .safetensors for the way back.")],
    image_to_video: Annotated[
        bool, typer.Option("--image-to-video", help="Of a folder, take the image-to-video model.")
    ] = False,
    autoencoder: Annotated[
        Path | None, typer.Option(help="DC-AE-V file or folder, where the published folder has none.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Wan pipeline (folder or hub id) that has what the published folder lacks.")
    ] = None,
    link: Annotated[bool, typer.Option("--link", help="Link what needs no conversion instead of copying it.")] = False,
    chunk_size: Annotated[int | None, typer.Option(help="Of an autoencoder that is none of the published.")] = None,
    scaling_factor: Annotated[float | None, typer.Option(help="Likewise: 1 / deviation of its latents.")] = None,
) -> None:
    """Convert published DC-VideoGen weights to diffusers, or an autoencoder back.

    Every key is used once and shapes are checked before weights are read.
    """
    with _one_line_errors():
        from .pipelines.published import LayoutError, beside, convert_repository

        if target.exists():
            raise LayoutError(f"{target} exists already: give a new name, or delete it first.")
        if target.suffix in (".pt", ".safetensors"):
            _write_published(source, target)
        elif source.is_dir():
            name = "DCVideoGenImageToVideoPipeline" if image_to_video else "DCVideoGenPipeline"
            convert_repository(source, target, name, autoencoder=autoencoder, base=base, link=link)
        else:
            from .autoencoders.convert import load_published

            changes = {"chunk_size": chunk_size, "scaling_factor": scaling_factor}
            model = load_published(source, **{name: value for name, value in changes.items() if value is not None})
            with beside(target) as draft:
                model.save_pretrained(draft)
        typer.echo(f"Wrote {target}")


def _write_published(source: Path, target: Path) -> None:
    """The way back: an `AutoencoderDCV` folder as one published file."""
    import torch
    from safetensors.torch import save_file

    from .autoencoders import AutoencoderDCV
    from .autoencoders.convert import CheckpointError, to_published

    if not (source / "config.json").is_file():
        raise CheckpointError(f"{source} is no folder of an AutoencoderDCV: it has no config.json.")
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
    with _one_line_errors():
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
