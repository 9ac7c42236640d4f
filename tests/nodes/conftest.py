"""One real ComfyUI server for all tests of the nodes that need one."""

from __future__ import annotations

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
