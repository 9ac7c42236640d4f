"""`demo.evaluate` says in one line, before it loads anything, what cannot be."""

from __future__ import annotations

import pytest
import torch
import typer
from typer.testing import CliRunner

from vidaccel.demo import evaluate, path


@pytest.fixture
def command(monkeypatch):
    """The command; it ends where the model would be loaded."""

    def loaded(*_, **__):
        raise AssertionError("it was loaded")

    monkeypatch.setattr("diffusers.WanPipeline.from_pretrained", loaded)
    app = typer.Typer()
    app.command()(evaluate.main)
    return lambda *options: CliRunner().invoke(app, list(map(str, options)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--weights", "nope"), "--weights is nope, but must be the folder of a pipeline"),
        (("--out", "nodir/e.json"), "--out nodir/e.json needs the folder nodir: make it first"),
        (("--out", "."), "--out . is a folder: give a file in it"),
        (("--sheet", "nodir/s.png"), "--sheet nodir/s.png needs the folder nodir"),
        (("--sheet", "s.xyz"), "--sheet is s.xyz, but its name must end in .jpg or .jpeg or .png"),
        (("--scheduler", "ddim"), "--scheduler is 'ddim': use unipc or euler"),
        (("--limit", 100), "--limit is 100, but must be between 1 and 64"),
        (("--steps", 0), "--steps is 0, but must be at least 1"),
        (("--batch-size", 0), "--batch-size is 0, but must be at least 1"),
        (("--size", 40), "--size is 40, but must be a multiple of 16"),
        (("--frames", 8), "--frames is 8, but must be 4k + 1"),
        (("--device", "gpu"), "--device is 'gpu': use cpu, or cuda"),
    ],
)
def test_what_cannot_be_is_one_line(command, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    done = command(*options)
    assert done.exit_code == 2 and done.stderr.startswith(f"Error: {words}") and done.stderr.count("\n") == 1


def test_what_can_be_is_loaded(command, tmp_path):
    done = command("--weights", path(), "--out", tmp_path / "e.json", "--sheet", tmp_path / "s.JPG", "--limit", 1)
    assert isinstance(done.exception, AssertionError) and str(done.exception) == "it was loaded"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused(command):
    assert "--device is 'cuda': use cpu" in command("--device", "cuda").stderr
