"""Adapter and autoencoder of a finished run in one small folder: `python -m vidaccel.lora.ship RUN FOLDER`.

The folder is what `DCVideoGenPipeline.from_pretrained` takes as adapter-only weights: half precision, and the
autoencoder beside the adapter. The built-in "demo-dc" was packed with it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Annotated

import typer


def ship(run: Path, target: Path) -> Path:
    """Pack the adapter of a run of `ae_adapt`, with the autoencoder that it was made for.

    Args:
        run: the `out` of the run.
        target: the folder to write; what was there is replaced once all is written.

    Raises:
        FileNotFoundError: the run is not finished, or its autoencoder is gone.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from ..autoencoders import AutoencoderDCV
    from ..pipelines.adapted import FACTS_FILE, FULL_FILE, LORA_FILE

    source = run / "adapter"
    if not (source / FACTS_FILE).is_file():
        raise FileNotFoundError(f"{source} holds no {FACTS_FILE}: let the run of ae_adapt come to its end first.")
    facts = json.loads((source / FACTS_FILE).read_text(encoding="utf-8"))
    draft = target.with_name(f".{target.name}.{os.getpid()}.part")
    draft.mkdir(parents=True)
    try:
        for name in (FULL_FILE, LORA_FILE):
            if (source / name).is_file():
                # The LoRA's alpha is in the metadata: without it, diffusers would take the rank.
                with safe_open(source / name, "pt") as file:
                    metadata = file.metadata()
                halves = {k: v.half().contiguous() for k, v in load_file(source / name).items()}
                save_file(halves, draft / name, metadata)
        vae = AutoencoderDCV.from_pretrained(run / "pipeline" / "vae", dtype=torch.float16)
        vae.save_pretrained(draft / "vae")
        (draft / FACTS_FILE).write_text(json.dumps({**facts, "autoencoder": "vae"}, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        draft.replace(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def main(
    run: Annotated[Path, typer.Argument(help="The folder `out` of a finished run of ae_adapt.")],
    target: Annotated[Path, typer.Argument(help="The folder to write.")],
) -> None:
    """Pack adapter and autoencoder in half precision."""
    ship(run, target)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    typer.echo(f"Wrote {target}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    typer.run(main)
