"""What was expected of the kernels on a GPU, beside what was measured.

    python benchmarks/gpu_targets.py                        # of benchmarks/results/gpu
    python benchmarks/gpu_targets.py --results FOLDER

Reads the rows of `attention.py` and the `kernels-GPU-SHAPE.json` of `kernels.py`, and writes `targets.md`
beside them. Targets were set for an H100 and bfloat16 at 75,600 tokens (Wan 2.1 14B, 720p); predictions were read from
the compiler's output before any GPU had run the kernels. What is not measured yet says so.
"""

from __future__ import annotations

import argparse  # not typer: machines with a GPU to measure on often have torch and nothing else
import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common import read_rows, write_markdown

from attention import summarise

SHAPE = "wan-14b-720p"
MIB_OF_QKV = 3 * 75_600 * 40 * 128 * 2 / 2**20
PREDICTED, TARGET = "prediction", "target"


class Measured:
    """The rows of a folder of results, of forward passes at `SHAPE`.

    Args:
        folder: where the scripts wrote; files that are not there yet have no rows.
    """

    def __init__(self, folder: Path) -> None:
        parts = sorted(folder.glob(f"kernels-*-{SHAPE}.json"))
        self.calls = [r for r in _calls(folder) if r["shape"] == SHAPE and r["pass"] == "forward" and r["ms"]]
        self.parts = {} if not parts else json.loads(parts[-1].read_text())

    def call(self, plan: str, density: float, of: str = "triton") -> dict | None:
        """The row of an implementation on a plan."""
        return next((r for r in self._at(plan, density) if r["implementation"] == of), None)

    def _at(self, plan: str, density: float) -> list[dict]:
        return [r for r in self.calls if r["plan"] == plan and abs(float(r["density"]) - density) < 0.1 * density]

    def over_dense(self, plan: str, density: float) -> float | None:
        """How many times as fast as the fastest dense kernel of others; None until one is measured."""
        return _figure(self.call(plan, density), "vs_dense")

    def rate(self, plan: str, density: float) -> float | None:
        """TFLOP/s."""
        return _figure(self.call(plan, density), "tflops")

    def over_flex(self) -> float | None:
        """The least lead over compiled FlexAttention, of all sparse plans."""
        found = []
        for row in self.calls:
            if row["implementation"] == "triton" and row["plan"] != "dense":
                flex = self.call(row["plan"], float(row["density"]), "flex")
                found += [] if flex is None else [float(flex["ms"]) / float(row["ms"])]
        return min(found, default=None)

    def planning(self, plan: str, density: float) -> float | None:
        """Share of planning in planning and attention, in per cent."""
        row = self.call(plan, density)
        if row is None:
            return None
        return 100 * float(row["planning_ms"]) / (float(row["planning_ms"]) + float(row["ms"]))

    def extra_memory(self) -> float | None:
        """The largest peak above that of dense attention, in copies of q, k and v together."""
        dense = self._peaks(lambda implementation: implementation.startswith("sdpa"))
        own = self._peaks(lambda implementation: implementation == "triton")
        return None if not dense or not own else (max(own) - min(dense)) / MIB_OF_QKV

    def _peaks(self, of: Callable[[str], bool]) -> list[float]:
        """MiB; of calls on a CPU none is known."""
        peaks = [_figure(row, "peak_mib") for row in self.calls if of(row["implementation"])]
        return [peak for peak in peaks if peak is not None]

    def pass_ms(self, start: str) -> float | None:
        """Milliseconds of a pass beside the forward kernel, by how its name starts."""
        return next((float(r["ms"]) for r in self.parts.get("passes", ()) if r["pass"].startswith(start)), None)

    def plan_ms(self, method: str) -> float | None:
        """Milliseconds of a warm plan."""
        return next((float(r["ms"]) for r in self.parts.get("planning", ()) if r["method"] == method), None)


def _figure(row: dict | None, column: str) -> float | None:
    """A figure of a row; None without the row, and where the row has none."""
    return None if row is None or row[column] in ("", None) else float(row[column])


def _calls(folder: Path) -> list[dict]:
    """The rows of `attention.py`, of a run that is not at its end too."""
    raw, table = folder / "attention.jsonl", folder / "attention.csv"
    if raw.is_file():
        return summarise(read_rows(raw))
    return list(csv.DictReader(table.read_text().splitlines())) if table.is_file() else []


@dataclass(frozen=True)
class Expected:
    """A figure that was written down before it was measured.

    Args:
        what: is meant. kind: `TARGET` or `PREDICTED`.
        least, most: bounds, None where there is none. unit: of both.
        of: the figure in what was measured.
    """

    what: str
    kind: str
    of: Callable[[Measured], float | None]
    unit: str
    least: float | None = None
    most: float | None = None

    def row(self, measured: Measured) -> dict[str, str]:
        """A line of the table."""
        value = self.of(measured)
        words = [f"at least {self.least:g}" if self.least is not None else ""]
        words += [f"at most {self.most:g}" if self.most is not None else ""]
        holds = value is not None and (self.least or 0) <= value <= (float("inf") if self.most is None else self.most)
        return {
            "what": self.what,
            "kind": self.kind,
            "expected": f"{' and '.join(filter(None, words))} {self.unit}",
            "measured": "not yet" if value is None else f"{value:.3g}",
            "holds": "" if value is None else "yes" if holds else "no",
        }


EXPECTED = (
    Expected("density 1 over the fastest SDPA", TARGET, lambda m: m.over_dense("dense", 1.0), "times", least=0.8),
    Expected("Radial at .25 over it", TARGET, lambda m: m.over_dense("radial", 0.25), "times", least=3.4),
    Expected("Radial at .1 over it", TARGET, lambda m: m.over_dense("radial", 0.1), "times", least=7.5),
    Expected("Radial at .05 over it", TARGET, lambda m: m.over_dense("radial", 0.05), "times", least=13),
    Expected("least lead over compiled FlexAttention", TARGET, Measured.over_flex, "times", least=1),
    Expected(
        "Tangent at .1: planning, of it and attention", TARGET, lambda m: m.planning("tangent", 0.1), "%", most=15
    ),
    Expected("k-means: assignment of 75,600 tokens", TARGET, lambda m: m.pass_ms("assignment"), "ms", most=2),
    Expected("peak memory above dense, in copies of q, k, v", TARGET, Measured.extra_memory, "copies", most=2),
    Expected("forward kernel, Radial at .25", PREDICTED, lambda m: m.rate("radial", 0.25), "TFLOP/s", least=420),
    Expected("keys copied in order", PREDICTED, lambda m: m.pass_ms("copy of keys"), "ms", most=0.6),
    Expected("walk of a plan of clusters", PREDICTED, lambda m: m.pass_ms("walk"), "ms", most=0.35),
    Expected("SVG's plan, of which its profile is 1", PREDICTED, lambda m: m.plan_ms("svg"), "ms", most=2),
)


def write(folder: Path) -> list[dict[str, str]]:
    """The table of a folder of results, as `targets.md` in it; its rows."""
    measured = Measured(folder)
    rows = [expected.row(measured) for expected in EXPECTED]
    gpus = " and ".join(dict.fromkeys(row["gpu"] for row in measured.calls)) or "no GPU yet"
    text = (
        f"Targets are for one H100, bfloat16, {SHAPE}; predictions were read from compiled code before any GPU "
        "had run it. Made by `python benchmarks/gpu_targets.py`."
    )
    write_markdown(folder / "targets.md", f"Expected and measured: {gpus}", text, rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "gpu")
    folder = parser.parse_args().results
    if not folder.is_dir():
        parser.error(f"--results {folder}: there is no such folder. `python benchmarks/first_gpu_run.py` makes it.")
    for row in write(folder):
        print(*row.values(), sep=" | ")


if __name__ == "__main__":
    main()
