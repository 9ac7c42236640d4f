"""Benchmark scripts run as a user runs them, and their tables."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    # No time limit: what bounds a script is the work it is given, and a busy machine takes its time.
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def table(path: Path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))
