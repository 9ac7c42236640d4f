"""Caches where processes share a sequence, of which each sees a part."""

from __future__ import annotations

import pytest
from diffusers import ContextParallelConfig, ParallelConfig
from eager_caches import EAGER
from tiny_wan import generate, make_pipe

import vidaccel
from vidaccel.pipelines.presets import Preset, PresetError

BY_PARTS = ("first_block", "magcache", "seacache", "cache_dit")


def share(pipe, **degree: int) -> None:
    """As `enable_parallelism` leaves it, which asks for the processes."""
    config = ContextParallelConfig(**degree)
    pipe.transformer._parallel_config = ParallelConfig(context_parallel_config=config)


def needs(name: str) -> None:
    if name == "cache_dit":
        pytest.importorskip("cache_dit")


@pytest.mark.parametrize("degree", ["ulysses_degree", "ring_degree"])
@pytest.mark.parametrize("name", BY_PARTS)
def test_a_cache_that_decides_by_parts_is_refused_before_anything_is_changed(name, degree):
    needs(name)
    pipe = make_pipe()
    share(pipe, **{degree: 2})
    told = f"processes share the sequence of the transformer, and the cache {name} goes by what it sees within"
    with pytest.raises(PresetError, match=told):
        vidaccel.apply(pipe, Preset(cache=EAGER[name]))
    assert not pipe.transformer._forward_pre_hooks


@pytest.mark.parametrize("name", BY_PARTS)
def test_parallelism_that_comes_later_is_refused_at_the_first_pass(name):
    needs(name)
    pipe = make_pipe()
    with vidaccel.apply(pipe, Preset(cache=EAGER[name])):
        expected = generate(pipe, steps=3)
        share(pipe, ulysses_degree=2)
        for _ in range(2):
            with pytest.raises(PresetError, match=f"the cache {name} goes by what it sees within the transformer"):
                generate(pipe, steps=3)
        pipe.transformer._parallel_config = None
        assert generate(pipe, steps=3).equal(expected)


@pytest.mark.parametrize("name", [name for name in EAGER if name not in BY_PARTS])
def test_what_decides_by_the_whole_or_by_the_step_is_taken(name):
    pipe = make_pipe()
    share(pipe, ulysses_degree=2)
    vidaccel.apply(pipe, Preset(cache=EAGER[name])).remove()
