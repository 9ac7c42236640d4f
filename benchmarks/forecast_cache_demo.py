"""The forecast cache on the built-in model: what each threshold gives and costs on held-out prompts, beside others.

    python benchmarks/forecast_cache_demo.py                 # two hours on a CPU; call it again to go on
    python benchmarks/forecast_cache_demo.py --prompts 8

Each held-out prompt is made as it is and with each setting, from one seed, one after the other in one process and on
one thread: passes of the transformer, CPU-seconds, how near each video is to the one of all passes, and whether it
shows all that the prompt says. Beside it, what else leaves steps out: the caches of diffusers, and fewer steps. Results
go to `benchmarks/results/forecast_cache_demo*`.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated, Any

import typer
from common import RESULTS
from lever_rows import STEPS, Row, run


def rows_of() -> dict[str, Row]:
    """What is measured, by name."""
    from vidaccel.pipelines.presets import Cache

    def cached(name: str, threshold: float, scale: float = 2.0, steps: int = STEPS, **settings: Any) -> Row:
        return Row(scale, steps, (("cache", Cache(name, threshold, settings)),), steps)

    return {
        "all passes": Row(),
        "forecast 0.05": cached("forecast", 0.05),
        "forecast 0.1 (default)": cached("forecast", 0.1),
        "forecast 0.2": cached("forecast", 0.2),
        "forecast 0.3": cached("forecast", 0.3),
        "seacache 0.25 (its default)": cached("seacache", 0.25),
        "seacache 0.4": cached("seacache", 0.4),
        "taylorseer 2, to the first order": cached("taylorseer", 2, max_order=1),
        "taylorseer 3, to the first order": cached("taylorseer", 3, max_order=1),
        "first_block 0.12": cached("first_block", 0.12),
        "12 steps instead of 20": Row(steps=12),
        "guidance 4: all passes": Row(4.0),
        "guidance 4: forecast 0.1": cached("forecast", 0.1, 4.0),
        "guidance 4: seacache 0.25": cached("seacache", 0.25, 4.0),
        "50 steps: all passes": Row(steps=50, against=50),
        "50 steps: forecast 0.1": cached("forecast", 0.1, steps=50),
        "50 steps: seacache 0.25": cached("seacache", 0.25, steps=50),
    }


CURVES = {
    "forecast": "forecast",
    "seacache": "SeaCache",
    "taylorseer": "TaylorSeer, first order",
    "first_block": "first-block cache",
    "12 steps": "12 steps instead of 20",
}
"""Beginning of a row's name -> what the plot calls it."""


def plot(out: Path) -> None:
    """PSNR over the passes that were computed, a line for each cache: forecast_cache_demo.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with (out / "forecast_cache_demo.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["PSNR to all passes, dB"]]
    fig, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for begins, label in CURVES.items():
        points = sorted(
            (float(row["passes"].split(" of ")[0]), float(row["PSNR to all passes, dB"]))
            for row in rows
            if row["setting"].startswith(begins)
        )
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set_xlabel("passes of the transformer, of 40")
    axes.set_ylabel("PSNR to the video of all passes, dB")
    axes.set_title("Steps left out, built-in model, 20 steps")
    axes.grid(alpha=0.3)
    axes.set_ylim(top=axes.get_ylim()[1] + 12)  # room for the legend
    axes.legend(loc="upper left")
    fig.savefig(out / "forecast_cache_demo.png", dpi=120)
    plt.close(fig)


def main(
    prompts: Annotated[int, typer.Option(min=1, max=64, help="Held-out prompts.")] = 64,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure, and write forecast_cache_demo.jsonl (prompt by prompt), .csv, .md and .png."""
    about = (
        "PSNR is the mean over the prompts, to the video of all passes at the same guidance scale and of 20 steps, or "
        "50 where the row says so, and the lowest of all.\n\n"
        "![PSNR over the passes that were computed](forecast_cache_demo.png)"
    )
    run("forecast_cache_demo", "Forecast cache on the built-in model", about, rows_of(), "all passes", prompts, out)
    plot(out)


if __name__ == "__main__":
    typer.run(main)
