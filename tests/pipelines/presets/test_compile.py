"""The lever `compile`: whole graphs under every cache and in every family, and blocks that are left as they were."""

from __future__ import annotations

import functools

import pytest
import torch
from eager_caches import EAGER
from tiny_families import build
from tiny_wan import generate, make_pipe, make_transformer
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import vidaccel
from vidaccel import SVG2, DenseSchedule, Preset
from vidaccel.pipelines.acceleration.families import find_transformers
from vidaccel.pipelines.presets import Compile, PresetError
from vidaccel.pipelines.presets.compiling import blocks_of, compile_blocks

SPARSE = {"method": SVG2(top_p=0.5, schedule=DenseSchedule(first_steps=1)), "backend": "reference"}
NAMED = ("wan_i2v", "hunyuan_video", "ltx", "kandinsky6", "minimax_h3")
"""Some of the families whose blocks diffusers names."""
UNNAMED = ("hunyuan_framepack", "cogvideox_5b", "consisid", "easyanimate", "mochi", "cosmos_25", "allegro")


@pytest.fixture
def counter(monkeypatch):
    """torch's compiler up to the graphs, which run as they are."""
    compiler, made = torch.compile, CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(
        torch, "compile", lambda model, *, mode=None, dynamic=None: compiler(model, backend=made, dynamic=dynamic)
    )
    yield made
    torch._dynamo.reset()


def is_whole(block: torch.nn.Module) -> bool:
    return block._compiled_call_impl is None and "forward" not in block.__dict__


@pytest.mark.parametrize("cache", [None, *EAGER])
def test_blocks_are_one_graph_beside_every_cache(cache, counter):
    if cache == "cache_dit":
        pytest.importorskip("cache_dit")
    preset = Preset(cache=EAGER.get(cache), **SPARSE)
    pipe = make_pipe(transformer=make_transformer(num_layers=6))
    with vidaccel.apply(pipe, preset) as handle:
        expected, account = generate(pipe), handle.report()
    with vidaccel.apply(pipe, preset.replace(compile=Compile())) as handle:
        assert torch.equal(generate(pipe), expected)
        assert handle.report().in_words() == account.in_words() and "compile: the blocks" in str(handle.report())
    assert all(map(is_whole, pipe.transformer.blocks))
    assert counter.frame_count == 1 and not counters["graph_break"]
    # What was compiled is found again by another handle.
    with vidaccel.apply(pipe, preset.replace(compile=Compile())):
        assert torch.equal(generate(pipe), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("family", [*NAMED, *UNNAMED])
def test_every_family_has_blocks(family, counter):
    tiny = build(family)
    expected = tiny.run()
    ((transformer, row),) = find_transformers(tiny.model).values()
    assert bool(transformer._repeated_blocks) == (family in NAMED)
    made = compile_blocks(transformer, row, Compile(), below_hooks=False)
    assert tiny.run().equal(expected) and counter.frame_count >= 1
    if family != "mochi":  # its attention drops padding, whose length only the data tells
        assert not counters["graph_break"]
    made.remove()
    assert all(map(is_whole, blocks_of(transformer, row)))


@pytest.mark.compiler
def test_compiled_code_makes_the_same_video_up_to_rounding():
    torch._dynamo.reset()
    pipe = make_pipe()
    with vidaccel.apply(pipe, Preset(**SPARSE)):
        expected = generate(pipe)
    with vidaccel.apply(pipe, Preset(compile=Compile(), **SPARSE)):
        torch.testing.assert_close(made := generate(pipe), expected, atol=1e-4, rtol=1e-4)
    assert not made.equal(expected)
    with vidaccel.apply(pipe, Preset(**SPARSE)):
        assert generate(pipe).equal(expected)


def test_a_guess_at_its_settings():
    assert Preset(compile=True) == Preset(compile="default") == Preset(compile={"mode": "default"})
    assert Preset(compile=False) == Preset() and Preset(compile=True).levers() == {"compile": "the blocks"}
    tuned = Preset(compile={"mode": "max-autotune-no-cudagraphs", "dynamic": True})
    assert Preset.from_dict(tuned.to_dict()) == tuned
    assert tuned.levers()["compile"] == "the blocks, max-autotune-no-cudagraphs"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("reduce-overhead", "compile is reduce-overhead: its mode must be one of default, max-autotune-no-cudagraphs"),
        ({"dynamic": 1}, "compile.dynamic is 1: it must be true or false"),
        ({"modus": "default"}, "compile: there is no modus; did you mean mode"),
        (3, "compile is 3: it must hold names and values"),
    ],
)
def test_bad_settings(given, message):
    with pytest.raises(PresetError, match=message):
        Preset(compile=given)


def compiled_whole(pipe):
    pipe.transformer.compile()


def wrapped(pipe):
    pipe.transformer = torch.compile(pipe.transformer)


def compiled_already(pipe):
    pipe.transformer.compile_repeated_blocks()


def in_groups(pipe, kind: str):
    cpu, blocks = torch.device("cpu"), {"num_blocks_per_group": 1} if kind == "block_level" else {}
    pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **blocks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (compiled_whole, "the transformer was compiled as a whole. Leave compile out"),
        (wrapped, "the transformer was compiled as a whole"),
        (compiled_already, "the blocks of the transformer are compiled already"),
        (functools.partial(in_groups, kind="block_level"), "offloaded one by one, by hooks .* Offload whole parts"),
        (functools.partial(in_groups, kind="leaf_level"), "offloaded one by one"),
    ],
)
def test_what_cannot_be_compiled_once_more(change, message):
    pipe = make_pipe()
    change(pipe)
    with pytest.raises(PresetError, match=message) as raised:
        vidaccel.apply(pipe, Preset(compile=True))
    assert raised.value.lever == "compile"


def test_a_compiler_that_is_missing(monkeypatch):
    monkeypatch.setattr("vidaccel.attention.code_generator._cpp_compiler", lambda: False)
    with pytest.raises(PresetError, match="torch's compiler needs a C\\+\\+ compiler .*Leave compile out"):
        vidaccel.apply(make_pipe(), Preset(compile=True))
