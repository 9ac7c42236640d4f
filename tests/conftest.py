"""What holds for every test: one CPU thread, no network, the same random numbers, and one copy of the package."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import tempfile
from pathlib import Path

# Before torch and huggingface_hub are imported, since both read these once; child processes inherit them.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# What was measured on the machine of the tests, and is kept there, is none of their business.
os.environ["HF_ASSETS_CACHE"] = str(Path(tempfile.gettempdir()) / f"vidaccel-tests-{os.getpid()}")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import importlib.util
from collections.abc import Generator

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# `python -m pytest` puts the current folder on sys.path. There `demo` or `report` would be second copies of modules of
# the package, and `nodes` would be in the way of ComfyUI's.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
# What several tests build on (tiny pipelines, plans with known masks).
sys.path.insert(0, str(ROOT / "tests" / "support"))

if importlib.util.find_spec("vidaccel") is None:
    # A checkout that is not installed: load the folder by path, as ComfyUI does, and it becomes `vidaccel`.
    spec = importlib.util.spec_from_file_location("vidaccel_checkout", ROOT / "__init__.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))

import vidaccel  # noqa: E402 - importable only now


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A job in the background of a shell script ignores Ctrl-C, and so would the processes that tests interrupt.
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header(config: pytest.Config) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return f"vidaccel {vidaccel.__version__} from {vidaccel.__path__[0]}; torch {torch.__version__}, {device}"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """All that is imported and collected stays: to look for garbage in it takes a quarter of that time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from vidaccel.attention import BACKENDS

    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "needs a CUDA device"
    reason = BACKENDS["flex"].unavailable(torch.device("cpu"))
    if reason is not None:
        missing["compiler"] = reason
    for item in items:
        for marker in missing.keys() & item.keywords:
            item.add_marker(pytest.mark.skip(reason=missing[marker]))


@pytest.fixture(autouse=True, scope="module")
def _small_heap() -> None:
    """Each collection of garbage walks only what the tests of this file made. One over torch, diffusers and all test
    modules takes half a second, and `accelerate` asks for it at the end of every training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
