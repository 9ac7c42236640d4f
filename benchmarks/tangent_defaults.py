"""What the defaults of `Tangent` rest on: the error of one attention call, on the demo model and on imitated heads.

    python benchmarks/tangent_defaults.py

Error is the relative L2 distance of the output of one call from dense attention, the geometric mean over calls. One
process and one thread, a few minutes. Results go to `benchmarks/results/tangent_defaults.md`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from common import RESULTS, environment_line, write_markdown
from heads import Tensors, demo_heads, synthetic_heads

from vidaccel import SVG2, Tangent, VideoLayout, sparse_attention
from vidaccel.attention import PlanMemory

PROMPTS = ["a red circle moves left on a grey background", "a blue square moves up on a black background"]
STEPS = range(4, 10)
Set = tuple[str, VideoLayout, list[list[Tensors]]]
"""A name, a layout, and for each layer q, k, v at consecutive steps."""


def sets(long: bool) -> Iterable[Set]:
    """The calls to measure on; the long ones take most of the time."""
    # Name, frames and size in pixels, steps of the sampler, layers, steps that are kept.
    videos = [("demo 576", 33, 128, 20, (1, 3, 5), STEPS)]
    if long:
        videos += [
            ("demo 1,088", 65, 128, 20, (1, 3, 5), STEPS),
            ("demo 2,112", 129, 128, 20, (1, 4), STEPS),
            ("demo 8,448", 129, 256, 8, (1, 4), range(2, 4)),
        ]
    for name, frames, size, num_steps, layers, steps in videos:
        layout, kept = demo_heads(PROMPTS[:1], frames, size, num_steps, steps)
        yield name, layout, [[kept[step, layer] for step in steps] for layer in layers]
    for layout in [VideoLayout(9, 8, 8), *([VideoLayout(9, 10, 12), VideoLayout(7, 19, 33)] if long else [])]:
        yield f"imitated {layout.tokens:,}", layout, [[synthetic_heads(layout)]]


class Measure:
    """One set of calls, with the dense outputs of the last step."""

    def __init__(self, layout: VideoLayout, layers: list[list[Tensors]]) -> None:
        self.layout = layout
        self.layers = [[tuple(x.float() for x in step) for step in steps] for steps in layers]
        self.dense = [F.scaled_dot_product_attention(*steps[-1]) for steps in self.layers]

    def error(self, method: Tangent | SVG2, history: bool = False) -> str:
        """At the last step, planned anew or, with a history, after the steps before it; "-" out of its reach."""
        try:
            method.check(self.layout)
        except ValueError:
            return "-"
        errors = []
        for steps, dense in zip(self.layers, self.dense, strict=True):
            memory = PlanMemory()
            for tensors in steps if history else steps[-1:]:
                plan = method.plan(*tensors, self.layout, memory)
            out = sparse_attention(*steps[-1], plan, backend="gather")
            errors.append(float((out - dense).norm() / dense.norm()))
        return f"{statistics.geometric_mean(errors):.4f}"

    def plan_seconds(self, method: Tangent) -> float:
        """Of the processor, since other processes may be at work, for the first plan of a layer."""
        start = time.process_time()
        method.plan(*self.layers[0][-1], self.layout, PlanMemory())
        return time.process_time() - start

    def row(self, name: str, settings: dict[str, dict], **common: object) -> dict[str, str]:
        """Errors of a table's columns."""
        return {"calls": name} | {
            f"{column}, density {density:g}": self.error(Tangent(density=density, **common, **changes))
            for column, changes in settings.items()
            for density in (0.1, 0.2)
        }


def main(out: Path = RESULTS, long: bool = True) -> None:
    """Measure everything; with `--no-long` on the 576 tokens alone."""
    out.mkdir(parents=True, exist_ok=True)  # before what takes minutes
    torch.set_num_threads(1)
    tables: dict[str, list[dict]] = {name: [] for name in ("probe", "clusters", "every", "iterations")}
    for name, layout, layers in sets(long):
        with torch.inference_mode():
            measure = Measure(layout, layers)
            base = SVG2().cluster_counts(layout.tokens)[0]
            for density in (0.1, 0.2, 0.35):
                paid = density - 1.5 * base / layout.tokens
                methods = {
                    "probe": Tangent(density=density, q_clusters=base, probe=True),
                    "probe, paid for": Tangent(density=paid, q_clusters=base, probe=True) if paid > 0 else None,
                    "without": Tangent(density=density, q_clusters=base, probe=False),
                    "svg2 compensate": SVG2(density=density, compensate=True),
                    "svg2": SVG2(density=density),
                }
                row = {label: measure.error(method) if method else "-" for label, method in methods.items()}
                tables["probe"].append({"calls": name, "density": density, **row})
            times = {f"{n}x": {"q_clusters": n * base} for n in (1, 2, 3, 4)}
            tables["clusters"].append(measure.row(name, times, probe=True))
            if len(layers[0]) > 3:
                every = {f"every {n}": {"recluster_every": n} for n in (1, 2, 3, 6)}
                errors = {
                    column: measure.error(Tangent(density=0.2, probe=True, **changes), history=True)
                    for column, changes in every.items()
                }
                tables["every"].append({"calls": name, **errors})
            iterations = {f"{n} iterations": {"init_iterations": n} for n in (3, 10, 50)}
            cost = {
                f"{column}, first plan ms": round(1000 * measure.plan_seconds(Tangent(probe=True, **changes)))
                for column, changes in iterations.items()
            }
            tables["iterations"].append(measure.row(name, iterations, probe=True) | cost)
            print(name, "done", flush=True)
    write_markdown(
        out / "tangent_defaults.md",
        "What the defaults of Tangent rest on",
        f"`python benchmarks/tangent_defaults.py`; {environment_line()}.\n\n"
        "Error of one attention call against dense attention, relative L2, the geometric mean over layers. Demo: q, "
        "k, v of a dense video of the demo model. Imitated: five kinds of heads of 128 channels (`heads.py`). A "
        "stand-in counts as one pair per query.\n\n"
        "1. The probe, with the query clusters of SVG2. *Paid for*: what it costs, 1.5 times query clusters over "
        "tokens, is taken from the density.\n"
        "2. Query clusters, in multiples of SVG2's.\n"
        "3. k-means at every so many steps, the error at the sixth of six consecutive steps at density 0.2. Every 6: "
        "not since the first.\n"
        "4. Iterations of the first k-means, and processor time of the first plan.",
        *tables.values(),
    )


if __name__ == "__main__":
    typer.run(main)
