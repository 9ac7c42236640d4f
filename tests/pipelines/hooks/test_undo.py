"""`restore` through a pipeline that shares a transformer, where the handle is lost with the pipeline that has it."""

from __future__ import annotations

import copy

import pytest
from diffusers import WanPipeline
from eager_caches import EAGER
from families.others import mochi
from gft_adapters import write_adapter
from gft_calls import loaded, made, saved
from tiny_wan import generate, make_pipe, make_transformer

import vidaccel
from vidaccel import SVG2, Preset
from vidaccel.pipelines.guidance_cache.samples import LeftOutSamples
from vidaccel.pipelines.hooks.diffusers_hooks import hooks_of
from vidaccel.pipelines.hooks.hooked import is_hooked

LEVERS = {
    **{name: lambda pipe, name=name: vidaccel.apply(pipe, Preset(cache=EAGER[name])) for name in EAGER},
    "method": lambda pipe: vidaccel.apply(pipe, Preset(method=SVG2(top_p=0.5), backend="reference")),
    "preset with a guidance cache": lambda pipe: vidaccel.apply(pipe, Preset(guidance_cache=2)),
    "guidance cache": lambda pipe: vidaccel.guidance_cache(pipe, 2, first_steps=0),
}
del LEVERS["cache_dit"], LEVERS["magcache"]


@pytest.mark.parametrize("lever", LEVERS)
def test_what_is_in_a_transformer_goes_by_any_pipeline_that_has_it(lever):
    pipe = make_pipe()
    other, plain = WanPipeline.from_pipe(pipe), generate(pipe, steps=6)
    other.set_progress_bar_config(disable=True)
    LEVERS[lever](pipe)  # the handle is lost
    assert not generate(pipe, steps=6).equal(plain)
    vidaccel.restore(other)
    assert generate(other, steps=6).equal(plain) and generate(pipe, steps=6).equal(plain)
    assert not any(hooks_of(module) for module in pipe.transformer.modules())
    assert not pipe.transformer._forward_pre_hooks and not [n for n in vars(pipe) if n.startswith("_vidaccel")]
    LEVERS[lever](other).remove()  # nothing is in its way


def test_guidance_in_one_pass_goes_with_it(tmp_path):
    pipe = loaded(saved(tmp_path))
    other, plain = WanPipeline.from_pipe(pipe), made(pipe)
    other.set_progress_bar_config(disable=True)
    vidaccel.guidance_free(pipe, write_adapter(tmp_path, tmp_path, pipe.transformer))
    assert not made(pipe).equal(plain)
    vidaccel.restore(other)
    assert made(other).equal(plain) and made(pipe).equal(plain) and type(pipe) is WanPipeline


def test_of_pipelines_that_share_one_transformer_of_two():
    """What is undone is all of a handle: what lies in the shared transformer is only a part."""
    shared = make_transformer(seed=1)
    both = make_pipe(transformer_2=shared, boundary_ratio=0.9)
    vidaccel.guidance_cache(both, 2)
    vidaccel.restore(make_pipe(transformer=shared))
    assert not hooks_of(both.transformer) and not hooks_of(shared)


def test_a_copy_and_what_shares_its_transformer_leave_the_original_alone():
    pipe = mochi()
    vidaccel.guidance_cache(pipe, 2)
    copied = copy.deepcopy(pipe)
    vidaccel.restore(type(copied).from_pipe(copied))
    assert not is_hooked(copied.transformer, LeftOutSamples) and is_hooked(pipe.transformer, LeftOutSamples)
    alone = copy.deepcopy(pipe.transformer)  # which has no handle
    vidaccel.restore(alone)
    assert not is_hooked(alone, LeftOutSamples) and is_hooked(pipe.transformer, LeftOutSamples)
    vidaccel.restore(type(pipe).from_pipe(pipe))
    assert not is_hooked(pipe.transformer, LeftOutSamples)
