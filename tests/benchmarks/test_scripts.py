"""The benchmark scripts run from end to end at the smallest size."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    # No time limit: what bounds a script is the work it is given, and a busy machine takes its time.
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def table(path: Path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_quality(tmp_path):
    arguments = ["--prompts", "2", "--steps", "3", "--densities", "0.5", "--processes", "1"]
    arguments += ["--only", "^(tangent|svg2, compensated|radial)"]
    run("quality.py", *arguments, "--out", str(tmp_path))
    rows = table(tmp_path / "quality.csv")
    fixed = [r for r in rows if r["dense"] == "20%" and r["wanted"] == "0.5"]
    assert {r["method"] for r in fixed} == {"tangent", "tangent, probed", "svg2, compensated", "radial"}
    assert all(0.4 < float(r["density of sparse calls"]) < 0.6 for r in fixed)
    assert all("±" in r["psnr - rival"] for r in fixed if r["method"] != "svg2, compensated")
    assert all(float(r["psnr mean"]) > 0 for r in rows[1:]) and rows[0]["psnr mean"] == ""
    assert {r["dense"] for r in rows[1:]} == {"0", "1", "2", "20%"}
    assert {r["wanted"] for r in rows} >= {"tolerance 0.05", "0.106"}
    assert (tmp_path / "quality.png").stat().st_size > 5000 and "| dense |" in (tmp_path / "quality.md").read_text()
    stamp = (tmp_path / "quality.jsonl").read_text()
    run("quality.py", *arguments, "--out", str(tmp_path))  # nothing left to do
    assert (tmp_path / "quality.jsonl").read_text() == stamp


def test_dc_videogen(tmp_path):
    run("dc_videogen.py", "--model", "tiny", "--sizes", "tiny", "--device", "cpu", "--out", str(tmp_path))
    deep, base = table(tmp_path / "dc_videogen-tiny-cpu.csv")
    assert deep["latents"].startswith("DC-AE-V") and base["latents"] == "Wan"
    assert (int(deep["tokens"]), int(base["tokens"])) == (2 * 2 * 2, 3 * 4 * 4)
    assert float(deep["step_ms"]) > 0 and float(deep["video_ratio"]) > 0 and base["video_ratio"] == ""


@pytest.mark.slow
def test_tangent_defaults(tmp_path):
    run("tangent_defaults.py", "--no-long", "--out", str(tmp_path))
    text = (tmp_path / "tangent_defaults.md").read_text()
    assert all(f"| {calls} 576 | {x} | 0." in text for calls in ("demo", "imitated") for x in (0.1, 0.2, 0.35))
    assert text.count("\n| --- |") == 4 and "nan" not in text


@pytest.mark.slow
def test_dc_demo(tmp_path):
    work = ["--clips", "2", "--bits", "16", "--bits", "4", "--rounds", "1", "--prompts", "1"]
    run("dc_demo.py", *work, "--out", str(tmp_path))
    result = json.loads((tmp_path / "dc_demo.json").read_text())
    assert [row["tokens"] for row in result["speed"]] == [576, 128]
    assert [row["model"] for row in result["accuracy"]] == ["demo", "demo-dc"]
    assert len(result["reconstruction"]) == 4
    assert (tmp_path / "dc_demo.jpg").stat().st_size > 5000 and "| demo-dc |" in (tmp_path / "dc_demo.md").read_text()


def test_cpu_speed(tmp_path):
    work = ["--rounds", "1", "--videos", "33x128,65x128", "--density", "0.5", "--backend", "gather"]
    run("cpu_speed.py", *work, "--out", str(tmp_path))
    rows = table(tmp_path / "cpu_speed.csv")
    assert [r["method"] for r in rows] == 2 * ["dense", "radial", "sparge", "svg", "svg2", "tangent"]
    assert [r["tokens"] for r in rows] == 6 * ["576"] + 6 * ["1088"]
    assert all(0.4 < float(r["density"]) < 0.6 for r in rows if r["method"] != "dense")
    assert "Speed on the CPU, 576 to 1,088 tokens" in (tmp_path / "cpu_speed.md").read_text()


def test_attention_goes_on_where_it_stopped(tmp_path):
    arguments = ["--shapes", "tiny", "--densities", "0.5", "--dtype", "float32", "--repeats", "3", "--device", "cpu"]
    arguments += ["--methods", "dense", "svg", "skewed clusters", "--out", str(tmp_path)]
    run("attention.py", *arguments, "--budget-seconds", "0")
    assert not (tmp_path / "attention.jsonl").exists() or not (tmp_path / "attention.jsonl").read_text()
    run("attention.py", *arguments)
    rows = table(tmp_path / "attention.csv")
    gather = {r["plan"]: r for r in rows if r["implementation"] == "gather"}
    assert set(gather) == {"dense", "svg", "skewed clusters"}
    assert all(float(r["ms"]) > 0 and float(r["max_error"]) < 1e-5 and r["note"] == "" for r in gather.values())
    assert 0.45 < float(gather["svg"]["density"]) < 0.55 and float(gather["svg"]["vs_dense"]) > 0
    assert "| cpu | tiny | svg |" in (tmp_path / "attention.md").read_text()
    assert (tmp_path / "attention.png").stat().st_size > 5000
    stamp = (tmp_path / "attention.jsonl").read_text()
    run("attention.py", *arguments)  # nothing left to do
    assert (tmp_path / "attention.jsonl").read_text() == stamp


def test_attention_backward(tmp_path):
    arguments = ["--shapes", "tiny", "--densities", "0.5", "--dtype", "float32", "--repeats", "3", "--device", "cpu"]
    run("attention.py", *arguments, "--methods", "dense", "svg", "--backward", "--out", str(tmp_path))
    rows = table(tmp_path / "attention.csv")
    assert {r["implementation"] for r in rows} == {"sdpa flash", "gather"} and {r["pass"] for r in rows} == {"backward"}
    assert all(float(r["ms"]) > 0 for r in rows)


def test_step(tmp_path):
    size = ["--frames", "9", "--height", "64", "--width", "64"]
    run(
        "step.py",
        "--model",
        "tiny",
        *size,
        "--steps",
        "2",
        "--density",
        "0.6",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    )
    rows = table(tmp_path / "step-tiny-64x64x9.csv")
    assert [r["method"] for r in rows] == ["dense", "radial", "svg", "svg2", "tangent"]
    assert all(float(r["attention ms"]) > 0 for r in rows) and float(rows[3]["planning ms"]) > 0
    assert float(rows[0]["density"]) == 1 and all(0.4 < float(r["density"]) < 0.8 for r in rows[1:])


def test_fidelity(tmp_path):
    work = ["--only", "^demo 576$", "--densities", "0.5"]
    run("fidelity.py", *work, "--out", str(tmp_path))
    (row,) = table(tmp_path / "fidelity.csv")
    errors = {name: float(row[name]) for name in ("tangent", "tangent, probed", "svg2, compensated", "svg2", "random")}
    assert errors["tangent, probed"] < errors["tangent"] < errors["svg2, compensated"] < errors["svg2"] < 1
    assert 0 < float(row["oracle, best keys"]) < errors["random"]
    assert (tmp_path / "fidelity.png").stat().st_size > 5000 and "Where another" in (
        tmp_path / "fidelity.md"
    ).read_text()
    stamp = (tmp_path / "fidelity.jsonl").read_text()
    run("fidelity.py", *work, "--out", str(tmp_path))  # nothing left to do
    assert (tmp_path / "fidelity.jsonl").read_text() == stamp


def test_first_gpu_run_goes_on_where_it_stopped(tmp_path):
    pytest.importorskip("triton")
    run("first_gpu_run.py", "--toy", "--out", str(tmp_path))
    assert json.loads((tmp_path / "done.json").read_text()) == {"kernels": "done"}
    page = (tmp_path / "kernels-interpreter-toy.md").read_text()
    assert "| radial |" in page and "| tangent |" in page and "chosen" in page
    log = (tmp_path / "kernels.log").stat().st_mtime_ns
    run("first_gpu_run.py", "--toy", "--out", str(tmp_path))
    assert (tmp_path / "kernels.log").stat().st_mtime_ns == log


@pytest.mark.slow
def test_lora_demo(tmp_path):
    """One step teaches nothing, and does not make the rule's colours."""
    arguments = ["--steps", "1", "--clips", "20", "--prompts", "1", "--denoising-steps", "4"]
    run("lora_demo.py", *arguments, "--work", str(tmp_path / "work"), "--out", str(tmp_path))
    made = json.loads((tmp_path / "lora_demo.json").read_text())
    base, trained = made["videos"]
    assert base["colour of the rule"] == 0 and base["all by the rule"] == 0
    assert trained["LoRA"] == "weight 1" and made["bytes"] > 100_000
    assert [row["step"] for row in made["errors"]] == [1]
    assert (tmp_path / "lora_demo.md").read_text().count("\n| --- |") == 2
