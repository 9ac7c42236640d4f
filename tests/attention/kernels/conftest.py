"""Without a GPU, Triton runs in its interpreter, which has to be asked for before the first import of triton.

The environment variable is set for that import and for these tests only: other tests start processes, which inherit it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import sys

import pytest
import torch

INTERPRET = not torch.cuda.is_available()
EARLY = "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"

if INTERPRET and not EARLY and importlib.util.find_spec("triton") is not None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        from vidaccel.attention import kernels

        for module in pkgutil.iter_modules(kernels.__path__):  # the kernels become interpreted ones
            importlib.import_module(f"{kernels.__name__}.{module.name}")

        from quick_interpreter import make_quick

        make_quick()


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRET:
        if EARLY:
            pytest.fail("something imported triton before these tests were collected: collect them first.")
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRET, reason="the GPU runs it for real")),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The interpreter, or the GPU."""
    return torch.device(request.param)
