"""`vidaccel tune` and `vidaccel break-even`: what a terminal shows, and exit codes."""

from __future__ import annotations

import os
import shlex
import signal

import pytest
from huggingface_hub import constants

from vidaccel import demo
from vidaccel.generation.tuning import space
from vidaccel.generation.tuning.journal import FILE, Journal

SMALL = ("--frames", 9, "--height", 64, "--width", 64, "--steps", 4)
PROMPT = "a red circle moves left on a grey background"
FEW_STEPS = demo.path("demo-dc") / "transformer" / "few_steps_4.safetensors"
CACHE_ALONE = ("--lever", "cache", "--cache", "first_block", "--effort", "quick", "--confirm", 1)


def test_a_budget_that_nothing_meets_is_no_success(vidaccel, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setitem(space.THRESHOLDS["first_block"], "quick", (1e3,))
    result = vidaccel("tune", "a cat", "--min-psnr", 99, "--out", tmp_path / "t", *CACHE_ALONE, *SMALL)
    assert result.exit_code == 3, (result.output, result.exception)
    unknown = "The built-in model does not know cat: "
    assert unknown in result.stderr and unknown not in result.stdout  # before what takes a while
    assert unknown in (tmp_path / "t" / "tune.html").read_text()
    assert "Nothing that was tried is within PSNR at least 99 dB, so no preset was written." in result.stdout
    assert "The nearest is first_block" in result.stdout and "below 99" in result.stdout
    assert (tmp_path / "t" / "tune.html").is_file() and not (tmp_path / "t" / "preset.yaml").exists()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_an_interrupted_run_says_how_to_go_on(vidaccel, tmp_path, monkeypatch, number, code):
    command = ("tune", PROMPT, "--min-psnr", 1, "--out", tmp_path / "my tune", *CACHE_ALONE, *SMALL)
    monkeypatch.setattr("sys.argv", ["/bin/vidaccel", *map(str, command)])
    whole = Journal.put

    def interrupted(self, key, value):
        if len(self) == 2:
            os.kill(os.getpid(), number)
        whole(self, key, value)

    monkeypatch.setattr(Journal, "put", interrupted)
    result = vidaccel(*command)
    assert result.exit_code == code, (result.output, result.exception)
    said, again = result.stderr.strip().splitlines()[-2:]
    kept = f"2 measurements are kept in {tmp_path / 'my tune'}"
    assert said == f"Interrupted: {kept}. The same command goes on from there:"
    assert len((tmp_path / "my tune" / FILE).read_text().splitlines()) == 3
    assert shlex.split(again) == ["vidaccel", *map(str, command)]
    monkeypatch.setattr(Journal, "put", whole)
    assert vidaccel(*shlex.split(again)[1:]).exit_code == 0
    monkeypatch.setattr("vidaccel.generation.tuning.api.tune", lambda *_, **__: os.kill(os.getpid(), number))
    result = vidaccel("tune", PROMPT, "--min-psnr", 1, "--out", tmp_path / "none")
    assert result.exit_code == code and result.stderr.endswith("Interrupted: nothing was measured yet.\n")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "Error: --min-psnr is needed, or another bound. Give --max-error, --min-psnr or --max-time-ratio."),
        (("--max-error", 2), "Error: --max-error is 2.0: it must be above 0 and at most 1 (0.05 is 5 %)."),
        (("--min-psnr", 30, "--threads", 0), "Error: --threads is 0: it must be at least 1."),
        (("--min-psnr", 30, "--threads", 100_000), "Error: --threads is 100000: it must be at most 1024. More than"),
        (("--min-psnr", 30, "--device", "cpu", "--offload-blocks"), "Error: --offload-blocks moves parts"),
        (("--min-psnr", 30, "--lever", "luck"), "Error: --lever is luck: there is none of that name;"),
        (
            ("--min-psnr", 30, "--effort", "thorogh"),
            "Error: --effort is thorogh: there is none of that name; did you m",
        ),
        (
            ("--min-psnr", 30, "--method", "sgv"),
            "Error: --method is sgv: there is none of that name; did you mean svg? There",
        ),
        (
            ("--min-psnr", 30, "--method", "sla"),
            "Error: --method is sla: it is none of the methods that can be measured",
        ),
        (("--min-psnr", 30, "--model", "demo-nothing"), "Error: --model is demo-nothing:"),
        (("--min-psnr", 30, "--adapter", "nowhere"), "Error: --adapter cannot be used:"),
        (("--max-error", 0.1, "--adapter", "nowhere"), "Error: --adapter cannot be used:"),
        (
            ("--max-error", 0.1, "--model", "demo-dc", "--adapter", FEW_STEPS),
            "Error: --max-error is no budget for --adapter: an adapter makes",
        ),
    ],
)
def test_bad_input(vidaccel, tmp_path, options, said):
    result = vidaccel("tune", PROMPT, "--out", tmp_path / "t", *SMALL, *options)
    assert result.exit_code == 2 and said in " ".join(result.stderr.split()), result.output
    assert not (tmp_path / "t").exists()


def test_break_even_is_measured_and_kept(vidaccel, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "vidaccel.generation.tuning.api.timer", lambda *_: lambda tokens: (tokens / 1e6, 1e-3 + tokens / 1e7)
    )
    result = vidaccel("break-even", "--device", "cpu")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "3 heads of 64, float32" in result.stdout and "Sparse attention pays from" in result.stdout
    (file,) = (tmp_path / "vidaccel" / "break_even").iterdir()
    assert f"Kept in {file}." in result.stdout
    result = vidaccel("break-even", "--device", "cpu", "--heads", 2, "--head-dim", 16, "--dtype", "bfloat16")
    assert result.exit_code == 0 and "2 heads of 16, bfloat16" in result.stdout, (result.output, result.exception)
    assert len(list(file.parent.iterdir())) == 2
    for wrong in (
        ("--method", "sla"), ("--seconds", 0), ("--head-dim", 0, "--heads", 2), ("--heads", 2),
        ("--model", "demo", "--heads", 2),
    ):  # fmt: skip
        result = vidaccel("break-even", *wrong)
        assert result.exit_code == 2 and wrong[0] in result.stderr


def test_a_cache_folder_that_cannot_be_written_is_not_the_models_fault(vidaccel, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    result = vidaccel("break-even", "--device", "cpu")
    said = " ".join(result.stderr.split())
    assert result.exit_code == 2 and said.startswith(f"Error: HF_ASSETS_CACHE is {tmp_path / 'file'}: "), result.output
    assert "--model" not in said and said.endswith("so nothing can be written below it. Give another folder.")
