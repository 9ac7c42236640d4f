"""The benchmark scripts run from end to end at the smallest size."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr


def table(path: Path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_quality(tmp_path):
    arguments = ["--prompts", "2", "--steps", "3", "--densities", "0.5", "--processes", "1"]
    run("quality.py", *arguments, "--out", str(tmp_path))
    rows = table(tmp_path / "quality.csv")
    assert [r["method"] for r in rows] == ["dense", "radial", "svg", "svg2", "random", "random, fixed"]
    assert all(0.4 < float(r["density of sparse calls"]) < 0.6 for r in rows[1:])
    assert all(float(r["psnr mean"]) > 0 for r in rows[1:]) and rows[0]["psnr mean"] == ""
    assert (tmp_path / "quality.png").stat().st_size > 5000 and "| dense |" in (tmp_path / "quality.md").read_text()
    stamp = (tmp_path / "quality.jsonl").read_text()
    run("quality.py", *arguments, "--out", str(tmp_path))  # nothing left to do
    assert (tmp_path / "quality.jsonl").read_text() == stamp


@pytest.mark.slow
def test_cpu_speed(tmp_path):
    run("cpu_speed.py", "--rounds", "1", "--out", str(tmp_path))
    rows = table(tmp_path / "cpu_speed.csv")
    assert [r["method"] for r in rows] == ["dense", "radial", "svg", "svg2"]
    assert all(0.15 < float(r["density"]) < 0.25 for r in rows[1:])
