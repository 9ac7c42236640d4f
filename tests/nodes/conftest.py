"""One real ComfyUI server for all tests of the nodes that need one; models in this process are forgotten in time."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from comfy_server import COMFYUI, WHY_SKIPPED, Server, running_server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on the CPU; skips where there is no ComfyUI."""
    if not COMFYUI:
        pytest.skip(WHY_SKIPPED)
    with running_server(tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def _no_model_outlives_its_tests() -> Iterator[None]:
    yield
    if "native_comfyui" in sys.modules:
        sys.modules["native_comfyui"].forget_models()
