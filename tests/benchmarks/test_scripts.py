"""The benchmark scripts of speed and error run from end to end at the smallest size."""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil

import pytest
from benchmark_scripts import ROOT, imported, run, table


def test_what_scripts_import_of_the_package_is_there():
    """Within functions, too, which no quick test of theirs calls."""
    lacking = []
    for file in [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vidaccel":
                module = importlib.import_module(node.module)
                names = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                lacking += [n for n in names if importlib.util.find_spec(f"{node.module}.{n}") is None]
    assert not lacking


@pytest.mark.slow
def test_cpu_speed(tmp_path):
    work = ["--rounds", "1", "--videos", "33x64,33x128", "--density", "0.7", "--backend", "gather"]
    run("cpu_speed.py", *work, "--out", str(tmp_path))
    rows = table(tmp_path / "cpu_speed.csv")
    assert [r["method"] for r in rows] == 2 * ["dense", "radial", "sparge", "svg", "svg2", "tangent"]
    assert [r["tokens"] for r in rows] == 6 * ["144"] + 6 * ["576"]
    assert all(0.6 < float(r["density"]) < 0.8 for r in rows if r["method"] != "dense")
    assert "Speed on the CPU, 144 to 576 tokens" in (tmp_path / "cpu_speed.md").read_text()


@pytest.mark.slow
@pytest.mark.compiler
def test_compiled_blocks(tmp_path):
    work = ["--rounds", "1", "--steps", "1", "--videos", "33x64", "--density", "0.7"]
    run("compiled_blocks.py", *work, "--out", str(tmp_path))
    rows = table(tmp_path / "compiled_blocks.csv")
    assert [row["attention"] for row in rows if "int8" not in row["attention"]] == ["dense", "tangent, density 0.7"]
    assert all(0 < float(row["off by"]) < 0.1 and float(row["of the time"]) > 0 for row in rows)
    assert "Compiled blocks on the CPU" in (tmp_path / "compiled_blocks.md").read_text()


@pytest.mark.slow
def test_attention_goes_on_where_it_stopped(tmp_path):
    arguments = ["--shapes", "tiny", "--densities", "0.5", "--dtype", "float32", "--repeats", "3", "--device", "cpu"]
    arguments += ["--methods", "dense", "svg", "tangent", "--out", str(tmp_path)]
    run("attention.py", *arguments, "--budget-seconds", "0")
    assert not (tmp_path / "attention.jsonl").exists() or not (tmp_path / "attention.jsonl").read_text()
    run("attention.py", *arguments)
    rows = table(tmp_path / "attention.csv")
    gather = {r["plan"]: r for r in rows if r["implementation"] == "gather"}
    assert set(gather) == {"dense", "svg", "tangent"}
    assert all(float(r["ms"]) > 0 and float(r["max_error"]) < 1e-4 and r["note"] == "" for r in gather.values())
    assert 0.45 < float(gather["svg"]["density"]) < 0.55 and float(gather["svg"]["vs_dense"]) > 0
    assert "| cpu | tiny | svg |" in (tmp_path / "attention.md").read_text()
    assert (tmp_path / "attention.png").stat().st_size > 5000
    stamp = (tmp_path / "attention.jsonl").read_text()
    run("attention.py", *arguments)  # nothing left to do
    assert (tmp_path / "attention.jsonl").read_text() == stamp


@pytest.mark.slow
def test_attention_backward(tmp_path):
    arguments = ["--shapes", "tiny", "--densities", "0.5", "--dtype", "float32", "--repeats", "3", "--device", "cpu"]
    run("attention.py", *arguments, "--methods", "dense", "svg", "--backward", "--out", str(tmp_path))
    rows = table(tmp_path / "attention.csv")
    assert {r["implementation"] for r in rows} == {"sdpa flash", "gather"} and {r["pass"] for r in rows} == {"backward"}
    assert all(float(r["ms"]) > 0 for r in rows)


@pytest.mark.slow
def test_step(tmp_path):
    work = ["--model", "tiny", "--frames", "9", "--height", "64", "--width", "64", "--steps", "2", "--density", "0.6"]
    work += ["--device", "cpu", "--out", str(tmp_path)]
    run("step.py", *work)
    rows = table(tmp_path / "step-tiny-64x64x9.csv")
    assert [r["method"] for r in rows] == ["dense", "radial", "svg", "svg2", "tangent"]
    assert all(float(r["attention ms"]) > 0 for r in rows) and float(rows[3]["planning ms"]) > 0
    assert float(rows[0]["density"]) == 1 and all(0.4 < float(r["density"]) < 0.8 for r in rows[1:])
    kept = tmp_path / "step-tiny-64x64x9.json"
    broken_off = {**json.loads(kept.read_text()), "left": ["tangent"]}
    del broken_off["tangent"]
    kept.write_text(json.dumps(broken_off))
    run("step.py", *work)
    again = table(tmp_path / "step-tiny-64x64x9.csv")
    assert again[:4] == rows[:4] and again[4]["method"] == "tangent" and again[4] != rows[4]


@pytest.mark.slow
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


def test_what_was_expected_of_a_gpu_stands_beside_what_was_measured(tmp_path):
    first = ROOT / "benchmarks" / "results" / "h200" / "attention_first.csv"
    shutil.copyfile(first, tmp_path / "attention.csv")
    parts = {"passes": [{"pass": "walk", "ms": 0.11}], "planning": [{"method": "svg", "ms": 96.0}]}
    (tmp_path / "kernels-NVIDIA-H200-wan-14b-720p.json").write_text(json.dumps(parts))
    run("gpu_targets.py", "--results", str(tmp_path))
    page = (tmp_path / "targets.md").read_text()
    assert "# Expected and measured: NVIDIA H200" in page
    for line in (
        "| density 1 over the fastest SDPA | target | at least 0.8 times | 0.78 | no |",
        "| Radial at .25 over it | target | at least 3.4 times | 3.04 | no |",
        "| Radial at .05 over it | target | at least 13 times | not yet |  |",
        "| least lead over compiled FlexAttention | target | at least 1 times | 1.17 | yes |",
        "| forward kernel, Radial at .25 | prediction | at least 420 TFLOP/s | 433 | yes |",
        "| walk of a plan of clusters | prediction | at most 0.35 ms | 0.11 | yes |",
        "| SVG's plan, of which its profile is 1 | prediction | at most 2 ms | 96 | no |",
    ):
        assert line in page


def measured_row(**changes):
    """A row of `attention.py` at the size that the targets are of."""
    own = {"gpu": "NVIDIA H200", "shape": "wan-14b-720p", "plan": "dense", "wanted": 1.0, "density": 1.0}
    own |= {"implementation": "triton", "pass": "forward", "ours": True, "ms": 263.3, "tflops": 445, "planning_ms": 0.0}
    return own | {"peak_mib": 900} | changes


def test_targets_of_a_run_that_was_killed_after_its_first_rows(tmp_path):
    """No dense kernel of others is measured yet, to which ratios would be, and half a row stands at the end."""
    rows = [measured_row(), measured_row(plan="radial", wanted=0.25, density=0.2496, peak_mib=None)]
    (tmp_path / "attention.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"gpu": "NVID')
    run("gpu_targets.py", "--results", str(tmp_path))
    page = (tmp_path / "targets.md").read_text()
    for line in (
        "| density 1 over the fastest SDPA | target | at least 0.8 times | not yet |  |",
        "| peak memory above dense, in copies of q, k, v | target | at most 2 copies | not yet |  |",
        "| forward kernel, Radial at .25 | prediction | at least 420 TFLOP/s | 445 | yes |",
    ):
        assert line in page


@pytest.mark.parametrize(
    "name",
    [
        "compiled_blocks",
        "fidelity",
        "forecast_cache_demo",
        "guidance_cache_demo",
        "planning_work",
        "quality",
        "tangent_defaults",
        "tolerance",
    ],
)
def test_the_folder_of_results_is_made_before_anything_is_measured(name, tmp_path):
    (tmp_path / "file").write_text("in its place")
    with imported(name) as script, pytest.raises(OSError, match="File exists"):
        script.main(out=tmp_path / "file")


@pytest.mark.slow
def test_first_gpu_run_goes_on_where_it_stopped(tmp_path):
    pytest.importorskip("triton")
    run("first_gpu_run.py", "--toy", "--out", str(tmp_path))
    done = json.loads((tmp_path / "done.json").read_text())
    assert done["machine"] == "the interpreter"
    assert done["steps"] == {"kernels": {"what": "done", "tries": 1, "seconds": 0}}
    assert "| not yet |" in (tmp_path / "targets.md").read_text()  # of a shape that a toy is not
    page = (tmp_path / "kernels-interpreter-toy.md").read_text()
    assert "| radial |" in page and "| tangent |" in page and "chosen" in page
    assert "| radial | 0.799 | int8 |" in page and "| radial | 0.799 | second stage |" in page
    log = (tmp_path / "kernels.log").stat().st_mtime_ns
    run("first_gpu_run.py", "--toy", "--out", str(tmp_path))
    assert (tmp_path / "kernels.log").stat().st_mtime_ns == log
