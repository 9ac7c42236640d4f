from __future__ import annotations

import importlib.util

import pytest
from eager_caches import EAGER

from vidaccel.pipelines.presets import Cache


@pytest.fixture(params=EAGER)
def cache(request) -> Cache:
    if request.param == "cache_dit" and importlib.util.find_spec("cache_dit") is None:
        pytest.skip("cache_dit is not installed")
    return EAGER[request.param]
