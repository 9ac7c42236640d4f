"""The README says what it says, and its commands run whole; `test_pages.py` runs or checks the code of every page."""

from __future__ import annotations

import csv
import re

import pytest
from doc_code import ROOT, blocks, commands, pages, small
from typer.testing import CliRunner

README = pages()["README.md"]
GENERATE = [words[1:] for words in commands(README) if words[0] == "vidaccel"]


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    """With nothing at hand but what it says."""
    monkeypatch.chdir(tmp_path)
    [code] = blocks(README, "python")
    exec(compile(small(code), "README.md", "exec"), {})
    assert "mean density" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", GENERATE, ids=" ".join)
def test_the_commands_run(arguments, tmp_path, monkeypatch):
    """Whole, but for the size of the video."""
    from vidaccel.cli import app

    monkeypatch.chdir(tmp_path)
    size = ["--frames", "9", "--height", "96", "--width", "96", "--steps", "2"]
    result = CliRunner().invoke(app, [*arguments, *size])
    assert result.exit_code == 0, result.output
    assert (tmp_path / arguments[arguments.index("--out") + 1]).stat().st_size > 1000
    if "--compare" in arguments:
        assert (tmp_path / "triangle.report.html").stat().st_size > 10_000


def test_it_begins_with_the_two_commands():
    assert [words[:2] for words in commands(README)][:2] == [["make", "demo"], ["make", "test"]]


def test_it_is_one_screen():
    """What is longer belongs to a page of `docs/`."""
    assert len(README.splitlines()) <= 100


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_table_is_that_of_the_results():
    with (ROOT / "benchmarks" / "results" / "quality.csv").open(encoding="utf-8", newline="") as file:
        results = list(csv.DictReader(file))
    measured = []
    for row in results:
        psnr = f"{float(row['psnr mean']):.1f} ± {float(row['psnr sd']):.1f}" if row["psnr mean"] else "–"
        sparse = row["method"] != "dense"
        density = f"{float(row['density of sparse calls']):.2f}"
        measured.append((row["method"], density, row["planning"] if sparse else "–", row["all right"], psnr))
    measured = {(*row[:2], f"{float(row[2]):.3f}" if row[2] != "–" else "–", *row[3:]) for row in measured}
    section = README.split("## Measured")[1].split("\n## ")[0]
    shown = [
        tuple(cell.strip() for cell in line.strip("|\n ").split("|")) for line in re.findall(r"^\|.*", section, re.M)
    ]
    assert len(shown) > 4
    for method, density, planning, right, psnr in shown[2:]:
        fits = [row for row in measured if row[:3] == (method, density, planning) and row[4] == psnr]
        assert [row for row in fits if f"{float(row[3]):.0%}".replace("%", " %") == right], (method, density)
