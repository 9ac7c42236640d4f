"""What the README shows runs, and says what it says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


VIDACCEL = [c[1:] for c in commands() if c[0] == "vidaccel"]
LOCAL = [c for c in VIDACCEL if "cuda" not in c]


def test_the_python_examples_run_one_after_the_other(tmp_path):
    """In one process, as a reader would in a notebook."""
    code = "\n".join(blocks("python"))
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "mean density" in result.stdout and "of the pairs" in result.stdout


@pytest.mark.parametrize("arguments", LOCAL, ids=" ".join)
def test_the_commands_run(arguments, tmp_path, monkeypatch):
    from vidaccel.cli import app

    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    if "--out" in arguments:
        assert (tmp_path / arguments[arguments.index("--out") + 1]).stat().st_size > 1000
    if "--compare" in arguments:
        assert (tmp_path / "report.html").stat().st_size > 10_000


def test_the_command_for_a_gpu_is_understood(tmp_path, monkeypatch):
    """Where there is no GPU or no hub it must fail for that reason, not for its options."""
    from vidaccel.cli import app

    (arguments,) = [c for c in VIDACCEL if "cuda" in c]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda **_: None)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "finds no CUDA device" in " ".join(result.output.split())


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [c[1] for c in commands() if c[0] == "make"]
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{t}:", makefile, re.MULTILINE) for t in targets)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_every_method_is_in_the_table():
    from vidaccel import METHODS

    assert all(f"| `{name}` |" in README for name in METHODS)
