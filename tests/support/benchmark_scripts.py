"""Benchmark scripts run as a user runs them, and their tables."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

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


@contextmanager
def imported(name: str) -> Iterator[ModuleType]:
    """A benchmark script as a module. Afterwards no other test finds it, or what the scripts share."""
    file = ROOT / "benchmarks" / f"{name}.py"
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(file.parent))
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        yield module
    for other in {path.stem for path in file.parent.glob("*.py")} - before:
        sys.modules.pop(other, None)
