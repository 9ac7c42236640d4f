from __future__ import annotations

import importlib.util

import pytest
from diffusers import WanPipeline
from eager_caches import EAGER
from gft_adapters import random_lora
from safetensors.torch import save_file
from tiny_wan import make_pipe, make_scheduler, make_transformer

from vidaccel.pipelines.presets import Cache


@pytest.fixture(params=EAGER)
def cache(request) -> Cache:
    if request.param == "cache_dit" and importlib.util.find_spec("cache_dit") is None:
        pytest.skip("cache_dit is not installed")
    return EAGER[request.param]


@pytest.fixture
def pair() -> tuple[WanPipeline, WanPipeline]:
    """Two pipelines with one transformer and a scheduler each."""
    pipe = make_pipe()
    other = WanPipeline.from_pipe(pipe, scheduler=make_scheduler())
    other.set_progress_bar_config(disable=True)
    return pipe, other


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """The file of a LoRA of the tiny Wan model."""
    file = tmp_path_factory.mktemp("lora") / "a.safetensors"
    save_file(random_lora(make_transformer(), "transformer")[1], file)
    return file
