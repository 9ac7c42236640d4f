"""Acceleration together with what else people do to a pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers import (
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    WanImageToVideoPipeline,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from peft import LoraConfig
from PIL import Image
from tiny_wan import generate, make_pipe, make_scheduler, make_transformer

import vidaccel
from vidaccel import SVG2, DenseSchedule
from vidaccel.pipelines.acceleration.rebinding import SparseProcessor

SPARSE = DenseSchedule(first_steps=1)
METHOD = SVG2(density=0.4, schedule=SPARSE)
BROADCAST = PyramidAttentionBroadcastConfig(
    spatial_attention_block_skip_range=2,
    spatial_attention_timestep_skip_range=(-1, 10**4),
    spatial_attention_block_identifiers=("blocks.*attn1",),
    current_timestep_callback=lambda: 500,
)


class TestOffloading:
    """`enable_model_cpu_offload` puts an accelerate hook on each model; it needs a GPU, the hook itself does not."""

    @pytest.mark.parametrize("order", ["offload first", "accelerate first"])
    def test_both_orders_give_the_same_video_and_leave_the_other_in_place(self, pipe, order):
        with vidaccel.accelerate(pipe, METHOD):
            expected = generate(pipe)
        dense = generate(pipe)
        hook = AlignDevicesHook(execution_device="cpu", io_same_device=True)
        if order == "offload first":
            add_hook_to_module(pipe.transformer, hook)
        handle = vidaccel.accelerate(pipe, METHOD)
        if order == "accelerate first":
            add_hook_to_module(pipe.transformer, hook)
        assert generate(pipe).equal(expected)
        handle.remove()
        assert pipe.transformer._hf_hook is hook
        assert generate(pipe).equal(dense)
        remove_hook_from_module(pipe.transformer)
        assert generate(pipe).equal(dense)


@pytest.mark.parametrize("order", ["lora first", "accelerate first"])
def test_lora(pipe, order):
    def add_lora():
        torch.manual_seed(5)
        pipe.transformer.add_adapter(
            LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
        )

    with vidaccel.accelerate(pipe, METHOD):
        without = generate(pipe)
    if order == "lora first":
        add_lora()
        with vidaccel.accelerate(pipe, METHOD):
            result = generate(pipe)
    else:
        with vidaccel.accelerate(pipe, METHOD):
            add_lora()
            result = generate(pipe)
    assert not torch.allclose(result, without, atol=1e-3)
    pipe.transformer.disable_adapters()
    with vidaccel.accelerate(pipe, METHOD):
        torch.testing.assert_close(generate(pipe), without)


@pytest.mark.compiler
def test_compiled_blocks_give_the_eager_video_without_a_compilation_per_layer():
    from torch._dynamo.testing import CompileCounterWithBackend

    pipe = make_pipe(transformer=make_transformer(num_layers=12))
    with vidaccel.accelerate(pipe, METHOD):
        expected = generate(pipe)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    with vidaccel.accelerate(pipe, METHOD) as handle:
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
        torch.testing.assert_close(generate(pipe), expected, atol=1e-4, rtol=1e-4)
        report = handle.report()
    # One graph, and one more where a first guess was too special; never one for each of the 12 layers.
    assert 1 <= counter.frame_count <= 2
    assert len(report.records) == 4 * 12 * 2 and {r.layer for r in report.records} == set(range(12))


def test_a_compiled_transformer_is_found_and_gives_the_eager_video(pipe):
    with vidaccel.accelerate(pipe, METHOD):
        expected = generate(pipe)
    torch._dynamo.reset()
    pipe.transformer = torch.compile(pipe.transformer, backend="aot_eager")
    with vidaccel.accelerate(pipe, METHOD) as handle:
        torch.testing.assert_close(generate(pipe), expected, atol=1e-4, rtol=1e-4)
        assert len(handle.report().records) == 4 * 3 * 2


def test_compiled_dense_calls_keep_the_attention_backend_too(pipe, monkeypatch):
    import diffusers.models.transformers.transformer_wan as module

    seen = []

    def spy(*args, backend=None, **kwargs):
        if not torch.compiler.is_compiling():  # cross-attention, which is compiled, and not ours
            seen.append(backend)
        return dispatch(*args, backend=backend, **kwargs)

    dispatch = module.dispatch_attention_fn
    monkeypatch.setattr(module, "dispatch_attention_fn", spy)
    torch._dynamo.reset()
    with vidaccel.accelerate(pipe, METHOD, schedule=DenseSchedule(first_steps=1.0)):
        for block in pipe.transformer.blocks:
            block.attn1.processor._attention_backend = "_native_math"
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        generate(pipe, steps=1)
    assert seen == ["_native_math"] * 6


def test_first_block_cache(pipe):
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    with vidaccel.accelerate(pipe, METHOD) as handle:
        cached = generate(pipe, steps=6)
        layers = [r.layer for r in handle.report().records]
    # With such a threshold the first block runs at each step and the others only at the first.
    assert layers.count(0) == 12 and layers.count(1) == layers.count(2) == 2
    pipe.transformer.disable_cache()
    with vidaccel.accelerate(pipe, METHOD):
        assert not generate(pipe, steps=6).equal(cached)


@pytest.mark.parametrize(
    ("cache", "schedule", "told"),
    [
        (FirstBlockCacheConfig(threshold=10.0), DenseSchedule(last_steps=1), True),
        (FirstBlockCacheConfig(threshold=10.0), SPARSE, False),
        (BROADCAST, DenseSchedule(last_steps=1), True),
    ],
    ids=["passes", "others", "layers"],
)
def test_a_dense_step_that_a_cache_skipped_is_told(pipe, cache, schedule, told):
    pipe.transformer.enable_cache(cache)
    with vidaccel.accelerate(pipe, METHOD, schedule=schedule) as handle:
        generate(pipe)
        generate(pipe)
        notes = [note for note in handle.report().notes if "a cache skipped steps that the schedule keeps" in note]
    assert bool(notes) is told and len(notes) <= 1


def test_wan_2_2_two_transformers():
    pipe = make_pipe(transformer_2=make_transformer(seed=1), boundary_ratio=0.9)
    before = generate(pipe, steps=6)
    with vidaccel.accelerate(pipe, METHOD) as handle:
        assert not generate(pipe, steps=6).equal(before)
        report = handle.report()
    steps = {m: sorted({r.step for r in report.records if r.model == m}) for m in ("transformer", "transformer_2")}
    assert steps["transformer"] and steps["transformer_2"]
    assert steps["transformer"] + steps["transformer_2"] == list(range(6))
    # "The first step stays dense" means the run's first, not each model's.
    assert all(r.reason == "" for r in report.records if r.model == "transformer_2")
    assert report.density_map().shape == (6, 6)
    assert generate(pipe, steps=6).equal(before)


def test_a_second_transformer_that_cannot_be_accelerated_leaves_the_first_alone():
    pipe = make_pipe(transformer_2=make_transformer(seed=1), boundary_ratio=0.9)
    inner = vidaccel.accelerate(pipe.transformer_2, METHOD)
    with pytest.raises(RuntimeError, match="transformer_2 is accelerated already"):
        vidaccel.accelerate(pipe, METHOD)
    assert not any(isinstance(p, SparseProcessor) for p in pipe.transformer.attn_processors.values())
    inner.remove()


def image(size: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8))


def test_image_to_video(vae):
    pipe = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=make_scheduler(),
        image_processor=None,
        image_encoder=None,
        transformer=make_transformer(in_channels=12),
    )
    pipe.set_progress_bar_config(disable=True)
    before = generate(pipe, image=image())
    with vidaccel.accelerate(pipe, METHOD) as handle:
        sparse = generate(pipe, image=image())
        assert len(handle.report().records) == 4 * 3 * 2
    assert not sparse.equal(before)
    assert generate(pipe, image=image()).equal(before)


def test_vace_both_stacks(vae):
    transformer = make_transformer(cls=WanVACETransformer3DModel, vace_layers=[0, 2], vace_in_channels=2 * 4 + 64)
    pipe = WanVACEPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=make_scheduler(), transformer=transformer
    )
    pipe.set_progress_bar_config(disable=True)
    video = [image()] * 17
    before = generate(pipe, video=video)
    with vidaccel.accelerate(pipe, METHOD) as handle:
        sparse = generate(pipe, video=video)
        own = [n for n, p in transformer.attn_processors.items() if isinstance(p, SparseProcessor)]
        assert own == [
            f"{blocks}.{i}.attn1.processor" for blocks, n in (("blocks", 3), ("vace_blocks", 2)) for i in range(n)
        ]
        assert len(handle.report().records) == 4 * (2 + 3) * 2
    assert not sparse.equal(before)
    assert generate(pipe, video=video).equal(before)


def test_half_precision_transformer(pipe):
    with vidaccel.accelerate(pipe, METHOD):
        exact = generate(pipe)
    pipe.transformer.to(torch.bfloat16)
    before = generate(pipe)
    with vidaccel.accelerate(pipe, "svg2", schedule=DenseSchedule(first_steps=1.0)):
        assert generate(pipe).equal(before)
    with vidaccel.accelerate(pipe, METHOD):
        assert (generate(pipe) - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_wan_2_2_image_conditioning_with_a_timestep_per_token(pipe):
    pipe.register_to_config(expand_timesteps=True)
    before = generate(pipe)
    with vidaccel.accelerate(pipe, METHOD) as handle:
        assert not generate(pipe).equal(before)
        report = handle.report()
    assert sorted({r.step for r in report.records}) == [0, 1, 2, 3] and report.dense_reasons() == {"first steps": 6}


def test_video_to_video_counts_the_steps_that_it_runs(vae):
    pipe = make_pipe(WanVideoToVideoPipeline, vae=vae)
    options = {"video": [image()] * 17, "strength": 0.5, "steps": 8}
    before = generate(pipe, **options)
    with vidaccel.accelerate(pipe, METHOD) as handle:
        assert not generate(pipe, **options).equal(before)
        report = handle.report()
    assert sorted({r.step for r in report.records}) == [0, 1, 2, 3] and report.dense_reasons() == {"first steps": 6}
    assert {r.num_steps for r in report.records} == {4}


def test_group_offloading(pipe):
    from diffusers.hooks import apply_group_offloading

    with vidaccel.accelerate(pipe, METHOD):
        expected = generate(pipe)
    cpu = torch.device("cpu")
    apply_group_offloading(pipe.transformer, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    with vidaccel.accelerate(pipe, METHOD):
        assert generate(pipe).equal(expected)


def test_the_attention_backend_of_dense_calls_is_the_one_set_in_diffusers(pipe):
    expected = generate(pipe)
    with vidaccel.accelerate(pipe, METHOD, schedule=DenseSchedule(first_steps=1.0)):
        pipe.transformer.set_attention_backend("_native_math")
        try:
            processors = [b.attn1.processor for b in pipe.transformer.blocks]
            assert all(p._attention_backend == "_native_math" for p in processors)
            torch.testing.assert_close(generate(pipe), expected, atol=1e-4, rtol=1e-4)
        finally:
            pipe.transformer.set_attention_backend("native")  # diffusers keeps the last choice for the whole process


def test_an_attention_backend_that_was_set_later_stays_when_the_handle_goes(pipe):
    with vidaccel.accelerate(pipe, METHOD):
        pipe.transformer.set_attention_backend("_native_math")
    try:
        assert {b.attn1.processor._attention_backend for b in pipe.transformer.blocks} == {"_native_math"}
    finally:
        pipe.transformer.set_attention_backend("native")  # diffusers keeps the last choice for the whole process
