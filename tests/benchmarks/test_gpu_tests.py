"""`benchmarks/gpu_tests.py` goes on where it was stopped: tests of a folder that count how often they run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from benchmark_scripts import ROOT


@pytest.mark.slow
def test_files_not_begun_come_first_and_what_passed_is_not_run_again(tmp_path):
    folder, ran = tmp_path / "tests", tmp_path / "ran"
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    for name in ("a", "b", "c", "d"):
        wanted = "assert (FOLDER / 'mended').exists()" if name == "b" else ""
        mark = "" if name == "d" else "@pytest.mark.gpu\n"
        (folder / f"test_{name}.py").write_text(
            f"import pathlib, pytest\nFOLDER = pathlib.Path({str(tmp_path)!r})\n\n{mark}def test():\n"
            f"    with (FOLDER / 'ran').open('a') as file:\n        file.write('{name}')\n    {wanted}\n"
        )
    # A call was stopped within the first file.
    kept = {"machine": "a GPU", "files": {"test_a.py": "begun"}}
    (tmp_path / "tests.json").write_text(json.dumps(kept))

    def call(machine="a GPU"):
        code = f"import torch, gpu_tests as g; g.gpu_and_versions = lambda: {machine!r}"
        return run(f"{code}; torch.cuda.is_available = lambda: True; g.main()", "--tests", folder, "--out", tmp_path)

    first = call()
    assert first.returncode == 1 and first.stderr.strip().endswith("did not pass: test_b.py"), first.stderr
    assert ran.read_text() == "bca" and "test_b.py::test FAILED" in first.stdout
    passed = {"test_a.py": "passed", "test_c.py": "passed", "test_d.py": "passed"}
    assert json.loads((tmp_path / "tests.json").read_text())["files"] == {**passed, "test_b.py": "exit code 1"}
    (tmp_path / "mended").touch()
    assert call().returncode == 0 and ran.read_text() == "bcab"
    assert call("another GPU").returncode == 0 and ran.read_text() == "bcababc"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_counts_as_passed(tmp_path):
    result = run("import gpu_tests; gpu_tests.main()", "--out", tmp_path)
    assert result.returncode == 2 and "no GPU that torch can use" in result.stderr and not list(tmp_path.iterdir())


def run(code, *arguments):
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); {code}",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True)
