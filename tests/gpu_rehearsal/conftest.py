"""Programs run as on a GPU, where there need not be one; see `pretended_gpu`."""

from __future__ import annotations

import importlib.util

import pytest
from pretended_gpu.guard import missing


@pytest.fixture(scope="session", autouse=True)
def _able() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    if (reason := missing()) is not None:
        pytest.skip(reason)
