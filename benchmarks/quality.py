"""What a method costs in quality: the demo model on its 64 held-out prompts, dense and sparse, with a random control.

    python benchmarks/quality.py

Every prompt is generated once per configuration from the same seed. Reported: whether shape, colour and motion are
right (`demo.checker`), and PSNR and SSIM against the dense video of the same seed. Results go to
`benchmarks/results/quality.*`; a run that was broken off goes on where it stopped (delete `quality.jsonl` to start
anew).
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import typer
from common import RESULTS, environment_line, write_markdown

# Name in the table -> method and settings. A method with one mask for the whole run is to be held against the fixed
# control, one that plans at every step against the redrawn one.
METHODS = {
    "radial": ("radial", {}),
    "svg": ("svg", {}),
    "svg2": ("svg2", {}),
    "svg2, compensated": ("svg2", {"compensate": True}),
    "random": ("random", {}),
    "random, fixed": ("random", {"redraw": False}),
}
BATCH = 8


def configurations(densities: tuple[float, ...]) -> Iterator[tuple[str, float]]:
    """(name, density) of every run."""
    yield "dense", 1.0
    for density in densities:
        for name in METHODS:
            yield name, density


def measure(first: int, count: int, steps: int, dense_steps: float, wanted: list[tuple[str, float]]) -> list[dict]:
    """Some configurations for `count` prompts from number `first`, in one process with one thread."""
    import torch

    torch.set_num_threads(1)
    from diffusers import WanPipeline

    from vidaccel import DenseSchedule, VideoLayout, accelerate, demo
    from vidaccel.attention import METHODS as CLASSES
    from vidaccel.demo.checker import check
    from vidaccel.demo.evaluate import sample
    from vidaccel.generation.comparison import compare

    pipe = WanPipeline.from_pretrained(demo.path())
    pipe.set_progress_bar_config(disable=True)
    schedule = DenseSchedule(first_steps=dense_steps)
    layout = VideoLayout(9, 8, 8)
    prompts = list(demo.HELD_OUT_PROMPTS[first : first + count])
    seeds = list(range(first, first + len(prompts)))
    rows = []

    def record(method: str, wanted: float, videos: torch.Tensor, references: torch.Tensor, report) -> None:
        sparse = [r.density for r in report.records if not r.reason] if report else [1.0]
        for index, prompt in enumerate(prompts):
            metrics = compare(as_bytes(references[index]), as_bytes(videos[index]))
            rows.append(
                {
                    "prompt": prompt,
                    "seed": seeds[index],
                    "method": method,
                    "wanted_density": wanted,
                    "sparse_density": statistics.mean(sparse),
                    "mean_density": report.mean_density() if report else 1.0,
                    "right": check(videos[index]).agrees_with(prompt),
                    "psnr": metrics.mean_psnr,
                    "ssim": metrics.mean_ssim,
                }
            )

    dense = sample(pipe, prompts, seeds, steps=steps)
    for name, density in wanted:
        if name == "dense":
            record(name, density, dense, dense, None)
            continue
        method, settings = METHODS[name]
        config = CLASSES[method].for_density(layout, density, schedule=schedule, **settings)
        with accelerate(pipe, config) as handle:
            videos = sample(pipe, prompts, seeds, steps=steps)
            record(name, density, videos, dense, handle.report())
    return rows


def as_bytes(video):
    """`[F, 3, H, W]` floats as `[F, H, W, 3]` uint8."""
    return (video.permute(0, 2, 3, 1).clamp(0, 1) * 255).round().byte().numpy()


def summarise(rows: list[dict]) -> list[dict]:
    """One line per configuration: mean, and the standard deviation over prompts where there is one."""
    groups: dict[tuple[str, float], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["wanted_density"]), []).append(row)
    table = []
    for (method, wanted), group in sorted(groups.items(), key=lambda item: (-item[0][1], "random" in item[0][0])):
        accuracy = {a: statistics.mean(r["right"][a] for r in group) for a in ("shape", "colour", "motion", "all")}
        line = {
            "method": method,
            "wanted density": wanted,
            "density of sparse calls": round(statistics.mean(r["sparse_density"] for r in group), 3),
            "density of all calls": round(statistics.mean(r["mean_density"] for r in group), 3),
            **{f"{a} right": round(v, 3) for a, v in accuracy.items()},
        }
        for metric, digits in (("psnr", 2), ("ssim", 4)):
            values = [r[metric] for r in group]
            dense = method == "dense"
            line[f"{metric} mean"] = "" if dense else round(statistics.mean(values), digits)
            line[f"{metric} sd"] = "" if dense else round(statistics.stdev(values), digits) if len(values) > 1 else ""
        table.append({**line, "videos": len(group)})
    return table


def figure(table: list[dict], path: Path) -> None:
    """PSNR and accuracy over density, one line a method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    dense = next(line for line in table if line["method"] == "dense")
    for method in METHODS:
        lines = sorted((line for line in table if line["method"] == method), key=lambda x: x["density of sparse calls"])
        if not lines:
            continue
        style = {"color": "grey", "linestyle": "--" if method == "random" else ":"} if "random" in method else {}
        density = [line["density of sparse calls"] for line in lines]
        axes[0].plot(density, [line["psnr mean"] for line in lines], marker="o", label=method, **style)
        axes[1].plot(density, [100 * line["all right"] for line in lines], marker="o", label=method, **style)
    axes[1].axhline(100 * dense["all right"], color="black", linewidth=0.8, label="dense")
    axes[0].set(xlabel="density of the sparse calls", ylabel="PSNR against dense, same seed (dB)")
    axes[1].set(xlabel="density of the sparse calls", ylabel="shape, colour and motion right (%)", ylim=(0, 102))
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main(
    prompts: int = 64,
    steps: int = 20,
    dense_steps: float = 0.2,
    densities: str = "0.2,0.35,0.5",
    processes: int = 2,
    out: Path = RESULTS,
) -> None:
    """Measure `--prompts` held-out prompts in `--processes` processes of one thread each."""
    wanted = tuple(float(d) for d in densities.split(","))
    raw = out / "quality.jsonl"
    rows = [json.loads(line) for line in raw.read_text().splitlines()] if raw.exists() else []
    settings = {"steps": steps, "dense_steps": dense_steps, "densities": densities}
    for row in rows:
        if row["settings"] != settings:
            raise typer.BadParameter(f"{raw} was made with {row['settings']}, not {settings}: delete it, or use --out.")
    done = {(row["seed"], row["method"], row["wanted_density"]) for row in rows}
    batches = {}
    for first in range(0, prompts, BATCH):
        seeds = range(first, min(first + BATCH, prompts))
        missing = [c for c in configurations(wanted) if any((s, *c) not in done for s in seeds)]
        if missing:
            batches[first] = missing
    with ProcessPoolExecutor(processes) as pool:
        futures = [
            pool.submit(measure, first, min(BATCH, prompts - first), steps, dense_steps, missing)
            for first, missing in batches.items()
        ]
        for future in as_completed(futures):
            made = [{**row, "settings": settings} for row in future.result()]
            again = {(row["seed"], row["method"], row["wanted_density"]) for row in made}
            kept = [row for row in rows if (row["seed"], row["method"], row["wanted_density"]) not in again]
            rows = kept + made
            raw.write_text("".join(json.dumps(row) + "\n" for row in sorted(rows, key=lambda r: r["seed"])))
            print(f"{len(rows)} videos", flush=True)
    table = summarise(rows)
    with (out / "quality.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    figure(table, out / "quality.png")
    write_markdown(
        out / "quality.md",
        "Quality of the methods on the demo model",
        f"`python benchmarks/quality.py --prompts {prompts} --steps {steps} --dense-steps {dense_steps} "
        f"--densities {densities}`; {environment_line()}.\n\n"
        f"Each configuration makes the same {prompts} held-out prompts from the same seeds (33 frames of 128x128, 576 "
        f"tokens, {steps} steps, the first {dense_steps:.0%} of them dense). *Right* is the share of videos in which "
        "the checker finds the shape, colour and motion asked for. PSNR and SSIM are against the dense video of the "
        "same seed (mean and standard deviation over videos). The controls keep random blocks of 16 tokens: *random* "
        "draws them anew at each step, so that its errors partly cancel over the run, and is what `svg` and `svg2` "
        "must beat, which plan at each step; *random, fixed* keeps them for the run, as `radial` does.\n\n"
        "![PSNR and accuracy over density](quality.png)",
        table,
    )


if __name__ == "__main__":
    typer.run(main)
