"""Each script of `examples/` runs on the built-in model, as it is but for fewer steps and frames."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vidaccel import VideoLayout
from vidaccel.attention import PlanMemory

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


def test_the_page_names_those_that_take_a_model():
    page = (EXAMPLES[0].parent / "README.md").read_text(encoding="utf-8")
    take_one = {script.name for script in EXAMPLES if '"--model"' in script.read_text(encoding="utf-8")}
    assert set(re.findall(r"`(\w+\.py)`", page)) == take_one


@pytest.mark.parametrize("text", [(0, 0), (3, 0), (0, 5), (3, 5)])
def test_text_in_the_sequence_is_read_by_all_and_reads_all_in_a_method_of_ones_own(text):
    script = next(path for path in EXAMPLES if path.stem == "own_method")
    method, layout = runpy.run_path(str(script))["NearFrames"](reach=1), VideoLayout(4, 2, 3, *text)
    q = torch.zeros(1, 2, layout.tokens, 8)
    plan = method.plan(q, q, q, layout, PlanMemory()).validate()
    frame = torch.arange(4).repeat_interleave(6)
    expected = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    expected[layout.video, layout.video] = (frame[:, None] - frame).abs() <= 1
    assert plan.to_dense_mask()[0, 0].equal(expected)


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
