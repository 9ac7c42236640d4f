"""Training of the demo model: `python -m vidaccel.demo.train all DIR --to FOLDER` runs its four steps.

They are vae, transformer, decoder and package.

Each step continues where an earlier run of it stopped. To use two CPU cores, run the transformer's step as
`torchrun --nproc-per-node 2 -m vidaccel.demo.train transformer DIR`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .training import LoopConfig

app = typer.Typer(help=__doc__, add_completion=False)

Out = Annotated[Path, typer.Argument(help="Folder of checkpoints, logs and results.")]
Steps = Annotated[int, typer.Option(help="Optimiser steps in all.")]
Bf16 = Annotated[bool, typer.Option(help="Compute forward passes in bfloat16.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int, typer.Option(help="CPU threads of this process.")]
SmallSteps = Annotated[int, typer.Option(help="Steps at 64x64 pixels.")]
FullSteps = Annotated[int, typer.Option(help="Steps at 128x128 pixels.")]
FocusSteps = Annotated[int, typer.Option(help="Further steps, with half of the noise levels where outlines form.")]
ObjectSteps = Annotated[int, typer.Option(help="Further steps like these, in which the object counts 4 times.")]
Clips = Annotated[int, typer.Option(help="Encoded clips to draw from at 64x64 pixels.")]
FullClips = Annotated[int, typer.Option(help="Encoded clips to draw from at 128x128 pixels.")]


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


@app.command()
def vae(out: Out, steps: Steps = 480, bf16: Bf16 = True, device: Device = "cpu", threads: Threads = 2) -> None:
    """Train the autoencoder and measure its latents."""
    from .train_vae import train_vae

    _set_threads(threads)
    config = LoopConfig(
        steps,
        learning_rate=3e-3,
        warmup=10,
        weight_decay=0.0,
        ema_decay=0.98,
        bf16=bf16,
        device=device,
        save_every=50,
        log_every=10,
    )
    train_vae(out, config)


@app.command()
def decoder(out: Out, steps: Steps = 160, bf16: Bf16 = True, device: Device = "cpu", threads: Threads = 2) -> None:
    """Train the decoder further, on whole clips; the latents do not change."""
    from .train_vae import train_decoder

    _set_threads(threads)
    config = LoopConfig(
        steps,
        learning_rate=1e-3,
        warmup=10,
        weight_decay=0.0,
        ema_decay=0.98,
        bf16=bf16,
        device=device,
        save_every=40,
        log_every=10,
    )
    train_decoder(out, config)


@app.command()
def transformer(
    out: Out,
    small_steps: SmallSteps = 1100,
    full_steps: FullSteps = 1000,
    focus_steps: FocusSteps = 800,
    object_steps: ObjectSteps = 1900,
    clips: Clips = 3000,
    full_clips: FullClips = 1500,
    bf16: Bf16 = True,
    device: Device = "cpu",
    threads: Threads = 1,
) -> None:
    """Train text encoder and transformer, first on small videos, then at full size."""
    from .train_transformer import Stage, train_transformer

    _set_threads(threads)
    stages = [
        Stage(small_steps, size=64, batch_size=32, clips=clips),
        Stage(full_steps, size=128, batch_size=8, clips=full_clips),
        Stage(focus_steps, size=128, batch_size=8, clips=full_clips, focus=0.5),
        Stage(object_steps, size=128, batch_size=8, clips=full_clips, focus=0.5, object_weight=4.0),
    ]
    config = LoopConfig(
        sum(stage.steps for stage in stages),
        learning_rate=2e-3,
        warmup=30,
        ema_decay=0.995,
        bf16=bf16,
        device=device,
        save_every=100,
        log_every=10,
    )
    train_transformer(out, stages, config)


@app.command()
def package(out: Out, to: Annotated[Path, typer.Option(help="Folder to write the pipeline to.")]) -> None:
    """Write the pipeline for shipping, in float16."""
    from .train_transformer import package as write

    write(out, to)


@app.command(name="all")
def run_all(out: Out, to: Annotated[Path, typer.Option(help="Folder to write the pipeline to.")]) -> None:
    """Run every step with its defaults, in one process."""
    vae(out)
    transformer(out)
    decoder(out)
    package(out, to)


if __name__ == "__main__":
    app()
