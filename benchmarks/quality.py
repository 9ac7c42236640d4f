"""What a method costs in quality: the demo model on its 64 held-out prompts, dense and sparse, with a random control.

    python benchmarks/quality.py                       # two processes on a CPU: hours
    python benchmarks/quality.py --device cuda         # all prompts at a time: minutes

Every prompt is generated once per configuration from the same seed, one that was used for no choice in this project.
Reported: whether shape, colour and motion are right (`demo.checker`), PSNR and SSIM against the dense video of the same
seed, the difference of each method to SVG2 with compensation prompt by prompt, and what planning costs in pairs beside
the density. Results go to `benchmarks/results/quality.*`; a run that was broken off goes on where it stopped (delete
`quality.jsonl` to start anew).
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from common import RESULTS, UNFINISHED, environment_line, read_rows, write_csv, write_markdown, write_whole

# Name in the table -> method and settings. A method with one mask for the whole run is to be held against the fixed
# control, one that plans at every step against the redrawn one.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "tangent": ("tangent", {}),
    "tangent, probed": ("tangent", {"probe": True}),
    "svg2, error route": ("svg2", {"compensate": True, "route": "error"}),
    "svg2, compensated": ("svg2", {"compensate": True}),
    "svg2": ("svg2", {}),
    "svg": ("svg", {}),
    "sparge": ("sparge", {}),
    "radial": ("radial", {}),
    "random": ("random", {}),
    "random, fixed": ("random", {"redraw": False}),
}
FEW_CLUSTERS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{name}, 16 key clusters": (METHODS[name][0], {**METHODS[name][1], "k_clusters": 16})
    for name in ("tangent, probed", "svg2, error route", "svg2, compensated")
}
SCANT = 0.05  # below what the stand-ins of the usual 43 key clusters cost at 576 tokens, .075
TOLERANCES = (0.01, 0.02, 0.05, 0.1)  # of `tangent, probed`, whose density then follows
DENSE_STEPS = (0, 1, 2)  # first steps that stay dense, beside the share that all methods are compared at
GREY = "#7f7f7f"
PAID_FOR = 0.106  # what is left of a density of .2 at 576 tokens when the probe is paid out of it
RIVAL = "svg2, compensated"  # what the others are held against, prompt by prompt
BATCH = 8


@dataclass(frozen=True)
class Configuration:
    """One row of the table.

    Args:
        name: of `METHODS` or `FEW_CLUSTERS`, or "dense".
        density: of the sparse calls; None where a tolerance stands for it.
        dense: first dense steps: a number, or a share of the steps.
        layers: first layers that stay dense.
        tolerance: of the output of a call, relative.
    """

    name: str
    density: float | None
    dense: float
    layers: int = 0
    tolerance: float | None = None

    def __str__(self) -> str:
        budget = f"tolerance {self.tolerance}" if self.tolerance else f"density {self.density}"
        dense = f"{self.dense:.0%} dense" if isinstance(self.dense, float) else f"{self.dense} dense steps"
        return f"{self.name}, {budget}, {dense}" + (f", {self.layers} dense layers" if self.layers else "")


def configurations(densities: Iterable[float], dense_steps: float) -> Iterator[Configuration]:
    """Every run: all methods with the same dense steps, then with fewer."""
    for density in densities:
        for name in METHODS:
            yield Configuration(name, density, dense_steps)
    for tolerance in TOLERANCES:
        yield Configuration("tangent, probed", None, dense_steps, tolerance=tolerance)
    for name in ("tangent", "tangent, probed", "svg2, error route", RIVAL):
        for dense in DENSE_STEPS:
            yield Configuration(name, 0.2, dense)
    yield Configuration("tangent, probed", 0.2, 0, layers=1)
    yield Configuration("tangent, probed", 0.2, 1, layers=1)
    yield Configuration("tangent, probed", PAID_FOR, dense_steps)
    for name in FEW_CLUSTERS:
        yield Configuration(name, SCANT, dense_steps)


def build(configuration: Configuration, layout):
    """The method of a configuration.

    Raises:
        OutOfReach: the layout does not allow the density.
    """
    from vidaccel import DenseSchedule
    from vidaccel.attention import METHODS as CLASSES

    method, settings = (METHODS | FEW_CLUSTERS)[configuration.name]
    schedule = DenseSchedule(first_steps=configuration.dense, first_layers=configuration.layers)
    if configuration.tolerance is not None:
        return CLASSES[method](tolerance=configuration.tolerance, schedule=schedule, **settings)
    return CLASSES[method].for_density(layout, configuration.density, schedule=schedule, **settings)


def measure(
    first: int,
    count: int,
    steps: int,
    size: int,
    first_seed: int,
    device: str,
    wanted: list[Configuration],
    seconds: float,
) -> tuple[list[dict], bool]:
    """Some configurations for `count` prompts from number `first`, on one thread; and whether all were made in time."""
    import torch

    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    from diffusers import WanPipeline

    from vidaccel import VideoLayout, accelerate, demo
    from vidaccel.attention.methods.base import OutOfReach
    from vidaccel.demo.checker import check
    from vidaccel.demo.evaluate import sample
    from vidaccel.generation.report.comparison import compare

    begin = time.perf_counter()
    pipe = WanPipeline.from_pretrained(demo.path()).to(device)
    pipe.set_progress_bar_config(disable=True)
    layout = VideoLayout(9, size // 16, size // 16)
    prompts = list(demo.HELD_OUT_PROMPTS[first : first + count])
    seeds = list(range(first_seed + first, first_seed + first + len(prompts)))
    rows = []

    def record(configuration: Configuration, videos, references, report, planning: float) -> None:
        sparse = [r.density for r in report.records if not r.reason] if report else [1.0]
        for index, prompt in enumerate(prompts):
            metrics = compare(as_bytes(references[index]), as_bytes(videos[index]))
            rows.append(
                {
                    "prompt": prompt,
                    "seed": seeds[index],
                    "configuration": str(configuration),
                    "method": configuration.name,
                    "wanted_density": configuration.density,
                    "tolerance": configuration.tolerance,
                    "dense_steps": configuration.dense,
                    "dense_layers": configuration.layers,
                    "planning": planning,
                    "sparse_density": statistics.mean(sparse),
                    "mean_density": report.mean_density() if report else 1.0,
                    "right": check(videos[index]).agrees_with(prompt),
                    "psnr": metrics.mean_psnr,
                    "ssim": metrics.mean_ssim,
                }
            )

    dense = sample(pipe, prompts, seeds, steps=steps, size=size).cpu()
    record(Configuration("dense", 1.0, 1.0), dense, dense, None, 0.0)
    for configuration in wanted:
        if time.perf_counter() - begin > seconds:
            return rows, False
        try:
            config = build(configuration, layout)
            config.check(layout)
        except OutOfReach as error:
            print(f"{configuration}: {error}", flush=True)
            continue
        with accelerate(pipe, config) as handle:
            videos = sample(pipe, prompts, seeds, steps=steps, size=size).cpu()
            record(configuration, videos, dense, handle.report(), config.planning_pairs(layout))
        print(f"{configuration}: {statistics.mean(r['psnr'] for r in rows[-len(prompts) :]):.2f} dB", flush=True)
    return rows, True


def as_bytes(video):
    """`[F, 3, H, W]` floats as `[F, H, W, 3]` uint8."""
    return (video.permute(0, 2, 3, 1).clamp(0, 1) * 255).round().byte().numpy()


def summarise(rows: list[dict]) -> list[dict]:
    """One line per configuration: means over prompts, standard deviations, and the paired difference to the rival."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["configuration"], []).append(row)
    table = []
    for group in groups.values():
        row = group[0]
        accuracy = {a: statistics.mean(r["right"][a] for r in group) for a in ("shape", "colour", "motion", "all")}
        line = {
            "method": row["method"],
            "wanted": f"tolerance {row['tolerance']}" if row["tolerance"] else row["wanted_density"],
            "dense": f"{row['dense_steps']:.0%}" if isinstance(row["dense_steps"], float) else row["dense_steps"],
            "dense layers": row["dense_layers"],
            "density of sparse calls": round(statistics.mean(r["sparse_density"] for r in group), 3),
            "planning": round(row["planning"], 3),
            "density of all calls": round(statistics.mean(r["mean_density"] for r in group), 3),
            **{f"{a} right": round(v, 3) for a, v in accuracy.items()},
        }
        dense = row["method"] == "dense"
        for metric, digits in (("psnr", 2), ("ssim", 4)):
            values = [r[metric] for r in group]
            line[f"{metric} mean"] = "" if dense else round(statistics.mean(values), digits)
            line[f"{metric} sd"] = "" if dense else round(statistics.stdev(values), digits) if len(values) > 1 else ""
        table.append({**line, "psnr - rival": paired(group, rows), "videos": len(group)})
    return sorted(table, key=rank_of)


def paired(group: list[dict], rows: list[dict]) -> str:
    """Mean difference in PSNR to the rival of the same seed, density and dense steps, with its standard error."""
    keys = ("seed", "wanted_density", "dense_steps", "dense_layers")
    rival = {tuple(r[k] for k in keys): r["psnr"] for r in rows if r["method"] == RIVAL}
    differences = [r["psnr"] - rival[key] for r in group if (key := tuple(r[k] for k in keys)) in rival]
    if group[0]["method"] in ("dense", RIVAL) or len(differences) < 2:
        return ""
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return f"{statistics.mean(differences):+.2f} ± {error:.2f}"


def rank_of(line: dict) -> tuple:
    """Dense first, then by dense steps, by density, and the best first."""
    wanted = line["wanted"]
    return (
        line["method"] != "dense",
        not str(line["dense"]).endswith("%"),
        str(line["dense"]),
        isinstance(wanted, str),
        -wanted if isinstance(wanted, float) else 0,
        -(line["psnr mean"] or 0),
    )


def figure(table: list[dict], path: Path) -> None:
    """PSNR and accuracy over density, one line a method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_hex

    fig, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    dense = next(line for line in table if line["method"] == "dense")
    cycle = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    colours = [c for c in cycle if to_hex(c) != GREY]  # which is the controls'
    for axis in axes:
        axis.set_prop_cycle(color=colours)
    for method in METHODS:
        lines = [x for x in table if x["method"] == method and str(x["dense"]).endswith("%")]
        lines = sorted((x for x in lines if x["wanted"] != PAID_FOR), key=lambda x: x["density of sparse calls"])
        lines = [x for x in lines if isinstance(x["wanted"], float)]
        if not lines:
            continue
        style: dict = {"color": GREY, "linestyle": "--" if method == "random" else ":"} if "random" in method else {}
        style |= {"linewidth": 2.5} if "tangent" in method else {}
        density = [line["density of sparse calls"] for line in lines]
        axes[0].plot(density, [line["psnr mean"] for line in lines], marker="o", label=method, **style)
        axes[1].plot(density, [100 * line["all right"] for line in lines], marker="o", label=method, **style)
    axes[1].axhline(100 * dense["all right"], color="black", linewidth=0.8, label="dense")
    axes[0].set(xlabel="density of the sparse calls", ylabel="PSNR against dense, same seed (dB)")
    axes[1].set(xlabel="density of the sparse calls", ylabel="shape, colour and motion right (%)", ylim=(0, 102))
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=7, loc="lower right")
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main(
    prompts: int = 64,
    steps: int = 20,
    size: int = 128,
    dense_steps: float = 0.2,
    densities: str = "0.05,0.1,0.2,0.35",
    only: str = "",
    first_seed: int = 5000,
    processes: int = 2,
    device: str = "cpu",
    seconds: float = float("inf"),
    out: Path = RESULTS,
) -> None:
    """Measure `--prompts` held-out prompts: on a CPU in `--processes` processes, on a GPU all at a time.

    Videos have `--size` pixels a side; the model was trained at 128.

    `--only` is a regular expression: configurations in whose names it is found, as printed, are measured, and what was
    measured before stays in the table. `--seconds` ends a run after the configuration that is under way then.
    """
    values = tuple(float(d) for d in densities.split(","))
    out.mkdir(parents=True, exist_ok=True)  # before what takes minutes
    raw = out / "quality.jsonl"
    rows = read_rows(raw)
    settings = {"steps": steps, "dense_steps": dense_steps, "densities": densities, "first_seed": first_seed}
    if size != 128:  # of which nothing was said in the rows that there were before
        settings["size"] = size
    for row in rows:
        if row["settings"] != settings:
            raise typer.BadParameter(f"{raw} was made with {row['settings']}, not {settings}: delete it, or use --out.")
    done = {(row["seed"], row["configuration"]) for row in rows}
    batch = BATCH if device == "cpu" else prompts
    batches = {}
    for first in range(0, prompts, batch):
        seeds = range(first_seed + first, first_seed + min(first + batch, prompts))
        every = (c for c in configurations(values, dense_steps) if re.search(only, str(c)))
        missing = [c for c in every if any((s, str(c)) not in done for s in seeds)]
        if missing:
            batches[first] = missing
    finished = True
    with ProcessPoolExecutor(processes if device == "cpu" else 1) as pool:
        futures = [
            pool.submit(measure, first, min(batch, prompts - first), steps, size, first_seed, device, missing, seconds)
            for first, missing in batches.items()
        ]
        for future in as_completed(futures):
            found, whole = future.result()
            finished &= whole
            made = [{**row, "settings": settings} for row in found]
            again = {(row["seed"], row["configuration"]) for row in made}
            rows = [row for row in rows if (row["seed"], row["configuration"]) not in again] + made
            ordered = sorted(rows, key=lambda row: row["seed"])
            write_whole(raw, "".join(json.dumps(row) + "\n" for row in ordered))
            print(f"{len(rows)} videos", flush=True)
    table = summarise(rows)
    write_csv(out / "quality.csv", table)
    figure(table, out / "quality.png")
    paid_for = any(line["wanted"] == PAID_FOR for line in table)
    fewer = any(line["videos"] < prompts for line in table)
    write_markdown(
        out / "quality.md",
        "Quality of the methods on the demo model",
        f"`python benchmarks/quality.py --prompts {prompts} --steps {steps} --dense-steps {dense_steps} "
        f"--densities {densities} --device {device}"
        f"`, configurations after one another by `--only`; {environment_line(device)}.\n\n"
        f"Each configuration makes the same {prompts} held-out prompts from the same seeds, {first_seed} and up (33 "
        f"frames of {size}x{size}, {9 * (size // 16) ** 2} tokens, {steps} steps; *dense*: how many of the first ones "
        "are dense). *Right* is the share of videos in which the checker finds the shape, colour and motion asked for. "
        "PSNR and SSIM are against the dense video of the same seed (mean and standard deviation over videos). "
        "*Density of sparse calls* counts text and stand-ins; *planning* is what a probe costs beside it, as a "
        "share of the pairs of dense attention. "
        f"*psnr - rival* is the mean difference to *{RIVAL}* of the same seed, density and dense steps, and its "
        "standard error. *tangent* takes its rank without a probe at so few tokens, *tangent, probed* with it"
        + ("; its row at .106 is what a density of .2 leaves when the probe is paid out of it" if paid_for else "")
        + ("; rows of fewer *videos* are of some of these prompts" if fewer else "")
        + ". The controls keep random blocks of 16 tokens: *random* draws them anew at each step, so that its errors "
        "partly cancel over the run, and is what methods must beat that plan at each step; *random, fixed* keeps them "
        "for the run, as `radial` does.\n\n"
        "![PSNR and accuracy over density](quality.png)",
        table,
    )
    if not finished:
        print("the time is up; call again to go on")
        raise typer.Exit(UNFINISHED)


if __name__ == "__main__":
    typer.run(main)
