"""How far one attention call is from dense attention, over density: every method, and an oracle.

    python benchmarks/fidelity.py
    python benchmarks/fidelity.py --only "demo 576"

On queries, keys and values of the demo model at three lengths, and on imitated heads of large models on three odd grids
(`heads.py`). Error is the relative L2 distance of the output from dense attention in float32, the geometric mean over
calls; a stand-in of a skipped cluster counts as one pair per query, the probe of `tangent` is in a column of its own.
The oracle keeps the best keys of each query, by the true weights, and drops the rest. Results go to
`benchmarks/results/fidelity.*`; what is measured is kept, and a run that was broken off goes on where it stopped.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from common import RESULTS, append_row, environment_line, read_rows, write_csv, write_markdown
from heads import Tensors, demo_heads, synthetic_heads
from quality import METHODS

from vidaccel import VideoLayout, sparse_attention
from vidaccel.attention import METHODS as CLASSES
from vidaccel.attention import PlanMemory
from vidaccel.attention.methods.base import OutOfReach

CONTENDERS = {name: of for name, of in METHODS.items() if name != "random, fixed"}  # one call is one mask
ORACLE = "oracle, best keys"
PROMPT = "a red circle moves left on a grey background"
ROWS = 512  # queries of the oracle at a time
TICKS = (0.05, 0.1, 0.2, 0.35, 0.5)

Loader = Callable[[], tuple[VideoLayout, list[Tensors]]]


def sets() -> dict[str, Loader]:
    """Name -> what makes a layout and the calls to measure on."""

    def of_demo(frames: int, size: int, steps: int, at: tuple[int, ...], layers: tuple[int, ...]) -> Loader:
        def load() -> tuple[VideoLayout, list[Tensors]]:
            layout, kept = demo_heads([PROMPT], frames, size, steps, at)
            return layout, [kept[step, layer] for step in at for layer in layers]

        return load

    def imitated(layout: VideoLayout) -> Loader:
        return lambda: (layout, [synthetic_heads(layout)])

    return {
        "demo 576": of_demo(33, 128, 20, (5, 12), (0, 2, 4, 5)),
        "demo 1,088": of_demo(65, 128, 20, (5, 12), (0, 2, 4, 5)),
        "demo 8,448": of_demo(129, 256, 8, (2,), (1, 4)),
        "imitated 9x17x23": imitated(VideoLayout(9, 17, 23)),
        "imitated 7x19x33": imitated(VideoLayout(7, 19, 33)),
        "imitated 11x30x52": imitated(VideoLayout(11, 30, 52)),
    }


def oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, density: float) -> torch.Tensor:
    """Attention of each query to its `density * N` heaviest keys, renormalised."""
    kept = max(1, round(density * k.shape[2]))
    parts = []
    for some in q.split(ROWS, dim=2):
        top = (some @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).topk(kept, -1)
        weights = torch.zeros(*some.shape[:3], k.shape[2]).scatter_(-1, top.indices, top.values.softmax(-1))
        parts.append(weights @ v)
    return torch.cat(parts, 2)


def measure(load: Loader, name: str, densities: list[float], done: set) -> Iterator[dict]:
    """Rows of one set."""
    missing = [(c, d) for d in densities for c in (*CONTENDERS, ORACLE) if (name, c, d) not in done]
    if not missing:
        return
    layout, calls = load()
    calls = [tuple(x.float() for x in call) for call in calls]
    dense = [F.scaled_dot_product_attention(*call) for call in calls]
    for contender, density in missing:
        row = {"calls": name, "tokens": layout.tokens, "method": contender, "wanted": density}
        if contender == ORACLE:
            outputs = [oracle(*call, density) for call in calls]
            yield row | {"density": density, "planning": 0.0, "error": error(outputs, dense)}
            continue
        method, settings = CONTENDERS[contender]
        try:
            config = CLASSES[method].for_density(layout, density, **settings)
            config.check(layout)
        except OutOfReach as problem:
            yield row | {"density": None, "planning": None, "error": None, "note": str(problem)}
            continue
        plans = [config.plan(*call, layout, PlanMemory()) for call in calls]
        outputs = [sparse_attention(*call, plan, backend="gather") for call, plan in zip(calls, plans, strict=True)]
        yield row | {
            "density": round(statistics.mean(plan.density() for plan in plans), 4),
            "planning": round(config.planning_pairs(layout), 4),
            "error": error(outputs, dense),
        }


def error(outputs: list[torch.Tensor], dense: list[torch.Tensor]) -> float:
    ratios = [float((a - b).norm() / b.norm()) for a, b in zip(outputs, dense, strict=True)]
    return round(statistics.geometric_mean(ratios), 5)


def pages(rows: list[dict]) -> tuple[list[dict], list[str]]:
    """The table, one line a set and density; and where `tangent` is not the best."""
    names = [*CONTENDERS, ORACLE]
    table, lost = [], []
    for calls, density in sorted(
        {(r["calls"], r["wanted"]) for r in rows}, key=lambda x: (list(sets()).index(x[0]), x[1])
    ):
        group = {r["method"]: r for r in rows if (r["calls"], r["wanted"]) == (calls, density)}
        errors = {name: group[name]["error"] for name in names if name in group and group[name]["error"] is not None}
        table.append(
            {
                "calls": calls,
                "density": density,
                "planning of tangent": group["tangent"]["planning"] if "tangent" in errors else "-",
                **{name: f"{errors[name]:.4f}" if name in errors else "-" for name in names},
            }
        )
        published = {name: e for name, e in errors.items() if "tangent" not in name and name != ORACLE}
        if "tangent" not in errors:
            lost.append(f"{calls} at {density}: out of its reach")
        elif published and (best := min(published, key=published.get)) and published[best] < errors["tangent"]:
            lost.append(f"{calls} at {density}: {best} has {published[best]:.4f}, tangent {errors['tangent']:.4f}")
    return table, lost


def figure(rows: list[dict], path: Path) -> None:
    """Error over density, one panel a set."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, NullLocator

    names = [name for name in sets() if any(r["calls"] == name for r in rows)]
    across = min(3, len(names))
    down = math.ceil(len(names) / across)
    fig, axes = plt.subplots(down, across, figsize=(4.2 * across, 3.4 * down), layout="constrained", squeeze=False)
    for axis, calls in zip(axes.flat, names, strict=False):
        for method in (*CONTENDERS, ORACLE):
            line = [r for r in rows if (r["calls"], r["method"]) == (calls, method) and r["error"] is not None]
            line = sorted((r["density"], r["error"]) for r in line)
            style: dict = {"color": "grey", "linestyle": ":"} if method in (ORACLE, "random") else {}
            style |= {"linewidth": 2.5} if method == "tangent" else {}
            if line:
                axis.plot(*zip(*line, strict=True), marker="." if method != ORACLE else "x", label=method, **style)
        axis.set(title=calls, xlabel="density", ylabel="relative error", xscale="log", yscale="log")
        axis.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3, which="both")
    handles = {label: line for line, label in zip(*axes.flat[len(names) - 1].get_legend_handles_labels(), strict=True)}
    fig.legend(handles.values(), handles, loc="outside lower center", ncols=5, fontsize=8)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main(only: str = "", densities: str = "0.05,0.1,0.2,0.35,0.5", out: Path = RESULTS) -> None:
    """Measure the sets in whose names the regular expression `--only` is found; the others stay as they were."""
    out.mkdir(parents=True, exist_ok=True)  # before what takes minutes
    torch.set_num_threads(1)
    wanted = [float(d) for d in densities.split(",")]
    raw = out / "fidelity.jsonl"
    rows = read_rows(raw, to_append=True)
    done = {(r["calls"], r["method"], r["wanted"]) for r in rows}
    with torch.inference_mode():
        for name, load in sets().items():
            if not re.search(only, name):
                continue
            for row in measure(load, name, wanted, done):
                rows.append(row)
                append_row(raw, row)
                print(row["calls"], row["method"], row["density"], row["error"], row.get("note", ""), flush=True)
    table, lost = pages(rows)
    write_csv(out / "fidelity.csv", table)
    figure(rows, out / "fidelity.png")
    where = "\n".join(f"- {line}" for line in lost) or "- nowhere in this table"
    write_markdown(
        out / "fidelity.md",
        "Error of one call at equal density",
        f"`python benchmarks/fidelity.py`; {environment_line()}.\n\n"
        "Relative L2 distance of the output from dense attention, geometric mean over calls: of the demo model (two "
        "steps and four layers of one video, two layers of the longest), and of five imitated heads of 128 channels. "
        "Stand-ins count as pairs; *planning of tangent* is what its probe costs beside the density, as a share of the "
        "pairs of dense attention; the error route pays a third of it. *tangent, probed* probes also where the default "
        "does not. *oracle* keeps the best "
        "keys of each query and drops the rest: what it loses to is what stands for the rest.\n\n"
        f"Where another method has less error than *tangent* at its default, or where that is out of reach:\n\n{where}"
        "\n\n![Error over density](fidelity.png)",
        table,
    )


if __name__ == "__main__":
    typer.run(main)
