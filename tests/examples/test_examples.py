"""Each script of `examples/` runs as it is, on the built-in model."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), *(["--steps", "2"] if "--steps" in script.read_text() else [])])
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.strip(), "an example says what it did"


@pytest.mark.slow
def test_two_processes_make_the_latents_of_one(tmp_path):
    script = next(path for path in EXAMPLES if path.stem == "two_processes")
    starts = [
        [sys.executable],
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    ]
    said = [subprocess.check_output([*start, str(script)], text=True, cwd=tmp_path) for start in starts]
    assert [text.count("the sum of the latents") for text in said] == [1, 1]
    assert said[0].splitlines()[-1] == said[1].splitlines()[-1]
    assert "one process" in said[0] and "by the other process" in said[1]
