"""The picture of a training run: `python -m vidaccel.demo.figure DIR --out loss.png` draws its logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def read_log(path: Path) -> list[dict]:
    """The rows of a JSONL log; of rows for the same step, the last one, as a resumed run writes some again."""
    rows = {}
    if path.is_file():
        for line in path.read_text().splitlines():
            row = json.loads(line)
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def draw(folder: Path, out: Path) -> None:
    """Draw the logs `vae.jsonl`, `decoder.jsonl` and `transformer.jsonl` of `folder` to a PNG.

    Raises:
        FileNotFoundError: when none of them is there.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    logs = {name: read_log(folder / f"{name}.jsonl") for name in ("vae", "decoder", "transformer")}
    if not any(logs.values()):
        raise FileNotFoundError(f"{folder} holds no training log (vae.jsonl, decoder.jsonl or transformer.jsonl)")
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, label in (("vae", "autoencoder"), ("decoder", "decoder, whole clips")):
        if logs[name]:
            left.plot([r["step"] for r in logs[name]], [r["psnr"] for r in logs[name]], label=label, lw=1)
    left.set(xlabel="step", ylabel="PSNR of the batch (dB)", title="Autoencoder")
    left.legend()
    for stage, label in ((0, "64x64"), (1, "128x128"), (2, "128x128, levels of outlines"), (3, "... and objects")):
        rows = [r for r in logs["transformer"] if r["stage"] == stage]
        right.plot([r["step"] for r in rows], [r["loss"] for r in rows], label=label, lw=1)
    right.set(xlabel="step", ylabel="flow-matching loss", title="Transformer, 33 frames", yscale="log")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=110)


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of the logs.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")],
) -> None:
    """Draw the training logs of a folder."""
    draw(folder, out)


if __name__ == "__main__":
    typer.run(main)
