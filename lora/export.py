"""Adapter and autoencoder of a finished run in one small folder: `python -m vidaccel.lora.export RUN FOLDER`.

The folder is what `from_pretrained` of `DCVideoGenPipeline` and `DCGenPipeline` takes as adapter-only weights: half
precision, and the autoencoder beside the adapter. The built-in "demo-dc" was packed with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export_adapter(run: Path, target: Path) -> Path:
    """Pack the adapter of a run of `ae_adapt`, with the autoencoder that it was made for.

    Args:
        run: the `out` of the run.
        target: the folder to write; an adapter that was there is replaced once all is written.

    Raises:
        FileNotFoundError: the run is not finished, or its autoencoder is gone.
        FileExistsError: `target` is there and no adapter.
        ValueError: adapter.json of the run, or config.json of its autoencoder, cannot be read.
    """
    import torch
    from diffusers import AutoencoderDC
    from safetensors import safe_open
    from safetensors.torch import load_file

    from ..autoencoders import AutoencoderDCV
    from ..autoencoders.checkpoint_file import variant_in
    from ..pipelines.deep_compression.adapter_folder import FACTS_FILE, FULL_FILE, LORA_FILE, read_facts
    from ..pipelines.files.json_files import write_json
    from ..pipelines.files.plain_content import object_in
    from .backbones.folders import write_model
    from .checkpoints.written import replaced, save_tensors

    source = run / "adapter"
    if not (source / FACTS_FILE).is_file():
        raise FileNotFoundError(f"{source} holds no {FACTS_FILE}: let the run of ae_adapt come to its end first.")
    facts = read_facts(source)
    if target.exists() and not (target / FACTS_FILE).is_file():
        raise FileExistsError(f"{target} exists and is no adapter (no {FACTS_FILE}): give another name, or delete it.")
    place = run / "pipeline" / "vae"
    if not (place / "config.json").is_file():
        raise FileNotFoundError(f"{place} holds no autoencoder (config.json): put the whole of the run together again.")
    try:
        of_images = object_in(place / "config.json").get("_class_name") == "AutoencoderDC"
    except ValueError as error:
        raise ValueError(f"{place / 'config.json'} cannot be read: {error}") from error
    cls = AutoencoderDC if of_images else AutoencoderDCV
    vae = cls.from_pretrained(place, dtype=torch.float16, variant=variant_in(place))
    with replaced(target) as draft:
        for name in (FULL_FILE, LORA_FILE):
            if (source / name).is_file():
                # The LoRA's alpha is in the metadata: without it, diffusers would take the rank.
                with safe_open(source / name, "pt") as file:
                    metadata = file.metadata()
                halves = {k: v.half() for k, v in load_file(source / name).items()}
                save_tensors(halves, draft / name, metadata)
        write_model(vae, draft / "vae")
        write_json(draft / FACTS_FILE, {**facts, "autoencoder": "vae"})
    return target


def main(
    run: Annotated[Path, typer.Argument(help="The folder `out` of a finished run of ae_adapt.")],
    target: Annotated[Path, typer.Argument(help="The folder to write.")],
) -> None:
    """Pack adapter and autoencoder in half precision."""
    try:
        export_adapter(run, target)
    except (OSError, ValueError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    typer.echo(f"Wrote {target}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    typer.run(main)
