"""The kernels' tests on a GPU, each file in a process of its own, going on where the last call stopped.

    python benchmarks/gpu_tests.py                         # results in benchmarks/results/gpu/tests.json
    python benchmarks/gpu_tests.py --tests tests/attention/kernels --out FOLDER

Files that were not begun yet come first, then those that failed or in which a call was stopped; what passed is not run
again on the same GPU with the same versions (delete `tests.json` to start anew). A kernel that writes where it should
not takes all further CUDA work of its process with it, and one that never ends its whole process: so either costs one
file.
"""

from __future__ import annotations

import argparse  # not typer: machines with a GPU to measure on often have torch and nothing else
import json
import subprocess
import sys
from pathlib import Path

import torch
from common import RESULTS, gpu_and_versions, write_whole

ROOT = Path(__file__).parents[1]
BEGUN, PASSED = "begun", "passed"
NONE_CHOSEN = 5  # pytest's exit code: the file has no tests for a GPU


def outcome(file: Path) -> str:
    """Run the tests for a GPU in a file: `PASSED`, or pytest's exit code in words."""
    # Verbose: the log says in which test a process was stopped.
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-m", "gpu", str(file)]
    code = subprocess.run(command, cwd=ROOT).returncode
    return PASSED if code in (0, NONE_CHOSEN) else f"exit code {code}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, default=ROOT / "tests" / "attention" / "kernels")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use here, so all would be skipped: run it where there is one.")
    files = {file.name: file for file in sorted(arguments.tests.glob("test_*.py"))}
    if not files:
        parser.error(f"--tests {arguments.tests}: no test_*.py there; give a folder of tests.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept, here = arguments.out / "tests.json", gpu_and_versions()
    before = json.loads(kept.read_text()) if kept.is_file() else {}
    known = before["files"] if before.get("machine") == here else {}

    def keep(name: str, what: str) -> None:
        known[name] = what
        write_whole(kept, json.dumps({"machine": here, "files": known}, indent=1) + "\n")

    for name in sorted(files, key=known.__contains__):  # of equal ones the order stays
        if known.get(name) == PASSED:
            continue
        keep(name, BEGUN)
        keep(name, outcome(files[name].resolve()))
        print(f"{name}: {known[name]}", flush=True)
    if failed := [name for name in files if known[name] != PASSED]:
        sys.exit(f"did not pass: {', '.join(failed)}")


if __name__ == "__main__":
    main()
