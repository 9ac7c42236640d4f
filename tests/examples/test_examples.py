"""Each script of `examples/` runs on the built-in model, as it is but for fewer steps and frames."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.py"))


def shorter(code: str) -> str:
    """With a quarter of the frames, and two steps where no argument asks for fewer."""
    code = re.sub(r'(?<=num_frames)(=|": )(\d+)', lambda m: f"{m[1]}{int(m[2]) // 4 + int(m[2]) % 4}", code)
    code = code.replace("    steps=wanted.steps,\n", "    steps=wanted.steps,\n    frames=9,\n")
    return re.sub(r"\bnum_inference_steps=\d+", "num_inference_steps=2", code)


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = script.read_text(encoding="utf-8")
    (tmp_path / script.name).write_text(shorter(code), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [script.name, *(["--steps", "2"] if "--steps" in code else [])])
    runpy.run_path(script.name, run_name="__main__")
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
