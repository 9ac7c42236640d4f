from __future__ import annotations

import pytest
from diffusers import WanPipeline
from tiny_wan import make_pipe


@pytest.fixture
def pipe() -> WanPipeline:
    return make_pipe()
