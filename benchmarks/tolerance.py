"""What error a tolerance of Tangent comes to in one attention call, and with how many pairs.

    python benchmarks/tolerance.py

On the calls of `fidelity.py`, each planned as at the first sparse step of a run. The tolerance is met on the queries
that planning measures; the error here is that of the output over all queries, relative L2. Results go to
`benchmarks/results/tolerance.*`; some minutes.
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from common import RESULTS, environment_line, write_csv, write_markdown
from fidelity import sets

from vidaccel import Tangent, sparse_attention
from vidaccel.attention import PlanMemory

TOLERANCES = (0.1, 0.05, 0.02, 0.01)


def main(only: str = "", out: Path = RESULTS) -> None:
    """Measure the sets in whose names the regular expression `--only` is found."""
    out.mkdir(parents=True, exist_ok=True)  # before what takes minutes
    torch.set_num_threads(1)
    table = []
    with torch.inference_mode():
        for name, load in sets().items():
            if not re.search(only, name):
                continue
            layout, calls = load()
            calls = [tuple(x.float() for x in call) for call in calls]
            dense = [F.scaled_dot_product_attention(*call) for call in calls]
            for tolerance in TOLERANCES:
                method = Tangent(tolerance=tolerance)
                densities, errors = [], []
                for call, whole in zip(calls, dense, strict=True):
                    plan = method.plan(*call, layout, PlanMemory())
                    made = sparse_attention(*call, plan, backend="gather")
                    densities.append(plan.density())
                    errors.append(float((made - whole).norm() / whole.norm()))
                table.append(
                    {
                        "calls": name,
                        "tolerance": tolerance,
                        "error": f"{statistics.geometric_mean(errors):.4f}",
                        "least error": f"{min(errors):.4f}",
                        "most error": f"{max(errors):.4f}",
                        "density": f"{statistics.mean(densities):.3f}",
                        "least density": f"{min(densities):.3f}",
                        "most density": f"{max(densities):.3f}",
                    }
                )
                print(*table[-1].values(), flush=True)
    write_csv(out / "tolerance.csv", table)
    write_markdown(
        out / "tolerance.md",
        "What a tolerance of Tangent comes to",
        f"`python benchmarks/tolerance.py`; {environment_line()}.\n\n"
        "Relative L2 distance of the output of one call from dense attention over all queries (geometric mean over "
        "calls, least and most), where planning met the tolerance on 32 queries of each head; of more than 16 heads it "
        "measures fewer of each, some 500 together. And the density that it took. A call stays below its tolerance "
        "where the stand-ins alone do, which is the least density. Calls as in [the errors at equal "
        "density](fidelity.md): eight of the demo model at 576 and at 1,088 tokens, two at 8,448, and five imitated "
        "heads in one call of each grid. At 576 tokens there is no probe.",
        table,
    )


if __name__ == "__main__":
    typer.run(main)
