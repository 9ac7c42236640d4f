"""The lever `compile`: whole graphs under every cache and in every family, and blocks that are left as they were."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from eager_caches import EAGER
from fast_set import fast
from tiny_families import BUILDERS, build
from tiny_wan import generate, make_pipe, make_transformer
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import vidaccel
from vidaccel import SVG2, DenseSchedule, Preset
from vidaccel.pipelines.acceleration.families import find_transformers
from vidaccel.pipelines.presets import Compile, PresetError
from vidaccel.pipelines.presets.compiling import blocks_of, compile_blocks

SPARSE = {"method": SVG2(top_p=0.5, schedule=DenseSchedule(first_steps=1)), "backend": "reference"}
FAST = ("wan", "hunyuan_video_i2v", "hunyuan_framepack", "cogvideox_5b", "mochi", "cosmos_25")
BROKEN = {
    "mochi": "its attention drops padding, whose length only the data tells",
    "ltx2_3_guided": "its perturbed passes go by data",
}
"""Families whose blocks are more than one graph, and why."""


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
    """Whether it is as its class has it; diffusers leaves the method of the class where a hook was."""
    own = block.__dict__.get("forward", block.forward)
    return block._compiled_call_impl is None and own.__func__ is type(block).forward


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


@pytest.mark.parametrize("family", fast(FAST, BUILDERS))
def test_the_blocks_of_every_family(family, counter):
    tiny = build(family)
    expected = tiny.run()
    ((transformer, row),) = find_transformers(tiny.model).values()
    blocks = blocks_of(transformer, row)
    inside = {part for block in blocks for part in block.modules()}
    assert len(set(blocks)) == len(blocks) and set(row.modules(transformer).values()) <= inside
    made = compile_blocks(transformer, row, Compile(), below_hooks=False)
    assert tiny.run().equal(expected) and counter.frame_count >= 1
    assert bool(counters["graph_break"]) == (family in BROKEN)
    made.remove()
    assert all(map(is_whole, blocks))


@pytest.mark.parametrize("cache", [None, "first_block", "magcache"])
def test_a_hook_that_was_there_before_stays(cache, counter):
    class Halved(ModelHook):
        def post_forward(self, module, output):
            return output / 2

    pipe = make_pipe()
    HookRegistry.check_if_exists_or_initialize(pipe.transformer.blocks[0]).register_hook(Halved(), "halved")
    expected = generate(pipe)
    preset = Preset(cache=EAGER.get(cache), compile=Compile())
    with vidaccel.apply(pipe, preset.replace(compile=None)):
        beside = generate(pipe)
    with vidaccel.apply(pipe, preset):
        assert generate(pipe).equal(beside)
    assert generate(pipe).equal(expected) and not expected.equal(generate(make_pipe()))


@pytest.mark.slow
def test_more_shapes_than_torch_compiles_by_itself(counter):
    pipe, shapes = make_pipe(), [(frames, size) for frames in (5, 9, 13) for size in (32, 64, 96)]
    with vidaccel.apply(pipe, Preset(compile=Compile(dynamic=False))):
        for frames, size in shapes:
            generate(pipe, steps=1, frames=frames, size=size)
    assert counter.frame_count == len(shapes) > torch._dynamo.config.recompile_limit


def test_a_copy_is_compiled_too(counter):
    pipe = make_pipe()
    with vidaccel.apply(pipe, Preset(compile=True, **SPARSE)):
        expected = generate(pipe)
        twin = copy.deepcopy(pipe)
    assert all(block._compiled_call_impl is not None for block in twin.transformer.blocks)
    assert generate(twin).equal(expected) and counter.frame_count <= 2
    vidaccel.restore(twin)
    assert all(map(is_whole, [*twin.transformer.blocks, *pipe.transformer.blocks]))


def test_two_transformers_with_second_passes_left_out(counter):
    other = make_transformer()
    for weight in other.parameters():
        weight.data.mul_(0.9)
    pipe = make_pipe(transformer_2=other, boundary_ratio=0.5)
    preset = Preset(guidance_cache=2)
    with vidaccel.apply(pipe, preset):
        expected = generate(pipe, steps=8)
    with vidaccel.apply(pipe, preset.replace(compile=Compile())) as handle:
        assert generate(pipe, steps=8).equal(expected) and counter.frame_count >= 1
        assert all(block._compiled_call_impl is not None for block in (*other.blocks, *pipe.transformer.blocks))
        assert handle.report().in_words()
    assert all(map(is_whole, (*other.blocks, *pipe.transformer.blocks)))


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
        (3, "compile is 3: it must be true, false, a mode, or hold"),
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


def a_block_wrapped(pipe):
    pipe.transformer.blocks[1] = torch.compile(pipe.transformer.blocks[1])


def a_forward_compiled(pipe):
    pipe.transformer.blocks[1].forward = torch.compile(pipe.transformer.blocks[1].forward)


def in_groups(pipe, kind: str):
    cpu, blocks = torch.device("cpu"), {"num_blocks_per_group": 1} if kind == "block_level" else {}
    pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **blocks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (compiled_whole, "the transformer was compiled as a whole. Leave compile out"),
        (wrapped, "the transformer was compiled as a whole"),
        (compiled_already, "blocks of the transformer are compiled already"),
        (a_block_wrapped, "blocks of the transformer are compiled already"),
        (a_forward_compiled, "blocks of the transformer are compiled already"),
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
    with pytest.raises(PresetError, match="torch's compiler needs a C\\+\\+ compiler .*Leave it out"):
        vidaccel.apply(make_pipe(), Preset(compile=True))
