"""How much planning multiplies beside the pairs that a density counts: counted operation by operation, not timed.

    python benchmarks/planning_work.py

The multiplications of matrix products in one call's plan (k-means, covariances, probe, profile) over those of dense
attention, by torch's `FlopCounterMode`, at the first sparse step of a run and as the mean of the three after it. They
depend on shapes alone, so tokens are random, and of the longer sequences one head is counted. What `Tangent` multiplies
each query with beside its plan is added. Results go to `benchmarks/results/planning_work.*`; a minute or two.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
import typer
from common import RESULTS, environment_line, write_csv, write_markdown
from torch.utils.flop_counter import FlopCounterMode

from vidaccel import METHODS, VideoLayout
from vidaccel.attention import PlanMemory

# Name -> layout and channels of a head.
SIZES = {
    "demo 576": (VideoLayout(9, 8, 8), 64),
    "demo 8,448": (VideoLayout(33, 16, 16), 64),
    "Wan 480p 32,760": (VideoLayout(21, 30, 52), 128),
    "Wan 720p 75,600": (VideoLayout(21, 45, 80), 128),
}
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "tangent": ("tangent", {}),
    "tangent, probed": ("tangent", {"probe": True}),
    "svg2": ("svg2", {}),
    "svg2, error route": ("svg2", {"compensate": True, "route": "error"}),
    "svg": ("svg", {}),
    "sparge": ("sparge", {}),
    "radial": ("radial", {}),
}
LATER = 3  # steps after the first, in one of which `Tangent` clusters anew


def shares(name: str, settings: dict[str, Any], layout: VideoLayout, dim: int) -> list[float]:
    """What each of some consecutive calls multiplies beside its pairs, over what dense attention does."""
    method = METHODS[name].for_density(layout, 0.2, **settings)
    memory, found = PlanMemory(), []
    dense = 4 * layout.tokens**2 * dim
    tokens = torch.randn(3, 1, 1, layout.tokens, dim).unbind(0)
    for _ in range(1 + LATER):
        with FlopCounterMode(display=False) as counter:
            plan = method.plan(*tokens, layout, memory)
        slopes = plan.skipped is not None and plan.skipped.slope is not None
        found.append((counter.get_total_flops() + slopes * 2 * layout.tokens * dim**2) / dense)
    return found


def main(out: Path = RESULTS) -> None:
    """Count all methods at all sizes."""
    out.mkdir(parents=True, exist_ok=True)  # before what takes minutes
    torch.manual_seed(0)
    table = []
    with torch.inference_mode():
        for size, (layout, dim) in SIZES.items():
            for name, contender in CONTENDERS.items():
                first, *later = shares(*contender, layout, dim)
                table.append(
                    {"calls": size, "method": name, "first": f"{first:.4f}", "later": f"{statistics.mean(later):.4f}"}
                )
                print(*table[-1].values(), flush=True)
    write_csv(out / "planning_work.csv", table)
    write_markdown(
        out / "planning_work.md",
        "What planning multiplies",
        f"`python benchmarks/planning_work.py`; {environment_line()}.\n\n"
        "Multiplications of one call beside the pairs that its density counts, over those of dense attention: matrix "
        "products of planning, and the matrix that *tangent* multiplies each query with. *First*: at the first sparse "
        "step of a run, whose k-means has more iterations; *later*: the mean of the three after it. *tangent* probes "
        "from 768 tokens up. Counted, not timed: what planning takes in time, with sorts and copies, is in the tables "
        "of speed.",
        table,
    )


if __name__ == "__main__":
    typer.run(main)
