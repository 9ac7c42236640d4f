"""diffusers' modular pipelines, whose guiders make the passes of a step."""

from __future__ import annotations

import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
)
from diffusers.hooks import LayerSkipConfig
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanBlocks
from diffusers.modular_pipelines.wan.modular_blocks_wan22 import Wan22Blocks
from tiny_wan import make_scheduler, make_transformer

import vidaccel
from vidaccel import SVG2, DenseSchedule, Preset
from vidaccel.generation.errors import BadInput
from vidaccel.pipelines.presets import Cache

METHOD = SVG2(density=0.4, schedule=DenseSchedule(first_steps=1))


def make(blocks=WanBlocks, **components):
    """A pipeline of the blocks between text encoder and autoencoder, whose latents have 16 channels."""
    chain = blocks()
    for name in ("text_encoder", "decode"):
        chain.sub_blocks.pop(name)
    pipe = chain.init_pipeline()
    parts = {"transformer": make_transformer(in_channels=16, out_channels=16), "scheduler": make_scheduler()}
    pipe.update_components(**parts | components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, steps: int = 4):
    embeds = torch.randn(2, 1, 6, 16, generator=torch.Generator().manual_seed(9))
    size = {"height": 64, "width": 64, "num_frames": 17, "num_inference_steps": steps}
    texts = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
    return pipe(**size, **texts, generator=torch.Generator().manual_seed(0), output="latents")


@pytest.mark.parametrize(
    ("guider", "branches"),
    [
        (ClassifierFreeGuidance(guidance_scale=5.0), {"cond", "uncond"}),
        (ClassifierFreeGuidance(guidance_scale=1.0), {"cond"}),
        (AdaptiveProjectedGuidance(), {"cond", "uncond"}),
        (SmoothedEnergyGuidance(seg_guidance_layers=[1]), {"cond", "uncond", "pass 2"}),
    ],
    ids=["guidance", "none", "projected", "smoothed energy"],
)
def test_steps_and_branches_are_those_of_the_guider(guider, branches):
    pipe = make(guider=guider)
    before = run(pipe)
    with vidaccel.accelerate(pipe, METHOD) as handle:
        assert not run(pipe).equal(before)
        run(pipe)
        report = handle.report()
        with handle.dense():
            assert run(pipe).equal(before)
    assert {r.branch for r in report.records} == branches
    assert {(r.run, r.step) for r in report.records} == {(run, step) for run in range(2) for step in range(4)}
    assert {r.step for r in report.records if r.reason} == {0}
    assert not [note for note in report.notes if "steps seen" in note]
    assert run(pipe).equal(before)


def test_layers_that_guidance_leaves_out_are_no_caches():
    """Its pass lacks a layer on purpose, also in a step that is kept dense; a cache beside it is told as it is."""
    skip = LayerSkipConfig(indices=[1], fqn="blocks")
    guider = SkipLayerGuidance(skip_layer_config=skip, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)
    pipe = make(guider=guider)
    method = SVG2(density=0.4, schedule=DenseSchedule(last_steps=1))
    with vidaccel.accelerate(pipe, method) as handle:
        run(pipe)
        assert not [note for note in handle.report().notes if "a cache skipped" in note]
    for cache in (None, Cache("first_block", 1e3)):
        with vidaccel.apply(pipe, Preset(method=method, cache=cache)) as handle:
            run(pipe)
            account = handle.report()
        assert account.steps[-1].forwards == account.steps[-1].computed == 3
        assert bool(account.counts()["skipped"]) is (cache is not None)
        assert not [note for note in account.notes if "a cache skipped" in note]


def loops(block) -> list:
    """What is set on the loops of a pipeline in the place of their progress bars."""
    own = [block.__dict__["progress_bar"]] if "progress_bar" in block.__dict__ else []
    return own + [end for inner in block.sub_blocks.values() for end in loops(inner)]


@pytest.mark.parametrize("undo", ["handle", "restore"])
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
def test_a_run_that_ends_early_is_forgotten_at_once(error, undo, monkeypatch):
    pipe = make(guider=ClassifierFreeGuidance(guidance_scale=5.0))
    handle = vidaccel.accelerate(pipe, METHOD)
    expected, engine = run(pipe), handle._installed[0].engine
    kept = []

    def failing(*_, **__):
        kept.append(bool(engine.memory.calls))
        if len(kept) == 2:
            raise error
        return step(*_, **__)

    step = pipe.scheduler.step
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(pipe.scheduler, "step", failing)
        run(pipe)
    assert kept == [False, True] and not engine.memory.calls  # the first step is dense
    assert run(pipe).equal(expected) and len(loops(pipe._blocks)) == 1
    handle.remove() if undo == "handle" else vidaccel.restore(pipe)
    assert not loops(pipe._blocks)


def test_two_transformers_are_one_run():
    models = {name: make_transformer(seed, in_channels=16, out_channels=16) for seed, name in enumerate(
        ("transformer", "transformer_2"))}  # fmt: skip
    pipe = make(Wan22Blocks, **models)
    pipe.update_components(boundary_ratio=0.9)
    with vidaccel.accelerate(pipe, METHOD) as handle:
        run(pipe, steps=6)
        records = handle.report().records
    steps = {m: {r.step for r in records if r.model == m} for m in models}
    assert all(steps.values()) and set.union(*steps.values()) == set(range(6))
    assert {r.step for r in records if r.reason} == {0}


def test_generate_says_what_to_use_instead():
    with pytest.raises(
        BadInput, match=r"modular pipelines are not run: .* inside `with vidaccel.accelerate\(pipe\):`"
    ) as got:
        vidaccel.generate(make(), "a dot")
    assert got.value.field == "model" and "supported:" not in str(got.value)
