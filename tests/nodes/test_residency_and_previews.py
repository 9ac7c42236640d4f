"""Where the weights of a pipeline are while it runs, and pictures of a video that is being made."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import WanPipeline
from torch.utils._pytree import tree_leaves

from vidaccel import SVG, SVG2, AutoencoderDCV, Tangent, VideoLayout, demo
from vidaccel.attention import PlanMemory
from vidaccel.autoencoders.memory import memory_to_decode
from vidaccel.generation.errors import BadInput
from vidaccel.generation.requests.settings import Settings
from vidaccel.nodes.pipeline.previews import decode_frame, decodes_quickly, preview_latent
from vidaccel.nodes.pipeline.residency import Residency, part_bytes, working_memory


@pytest.fixture(scope="module")
def pipe():
    loaded = WanPipeline.from_pretrained(demo.path())
    loaded.set_progress_bar_config(disable=True)
    return loaded


def run(pipe, **changes):
    return pipe("a red circle", height=64, width=64, num_frames=9, num_inference_steps=2, **changes)


def test_every_part_is_brought_in_before_it_works_and_only_when_another_was_there():
    pipe = WanPipeline.from_pretrained(demo.path())
    pipe.set_progress_bar_config(disable=True)
    order = []
    residency = Residency(torch.device("cpu"), lambda part, memory: order.append((type(part).__name__, memory)))
    residency.attach(pipe)
    settings, layout = Settings("x", frames=9, height=64, width=64), VideoLayout(3, 4, 4)
    residency.begin(pipe, layout, settings)
    run(pipe)
    needs = working_memory(pipe, layout, settings)
    expected = [("UMT5EncoderModel", 0), ("WanTransformer3DModel", needs["transformer"])]
    assert order == [*expected, ("AutoencoderKLWan", needs["vae"])]
    residency.begin(pipe, layout, settings)  # something else may have taken the device
    run(pipe)
    assert len(order) == 6


def test_a_part_is_asked_for_anew_when_something_else_used_the_device():
    pipe = WanPipeline.from_pretrained(demo.path())
    pipe.set_progress_bar_config(disable=True)
    order = []
    residency = Residency(torch.device("cpu"), lambda part, memory: order.append(type(part).__name__))
    residency.attach(pipe)
    run(pipe, callback_on_step_end=lambda *_: residency.invalidate() or {})
    assert order == ["UMT5EncoderModel", "WanTransformer3DModel", "WanTransformer3DModel", "AutoencoderKLWan"]


def test_weights_that_the_device_cannot_hold_are_refused_before_anything_runs(pipe):
    settings, layout = Settings("x", frames=9, height=64, width=64), VideoLayout(3, 4, 4)
    size = part_bytes(pipe)["transformer"]
    # And the rotary tables, which move with them.
    assert 4 * pipe.transformer.num_parameters() <= size < 4.3 * pipe.transformer.num_parameters()
    Residency(torch.device("cpu"), lambda *_: None, capacity=size).begin(pipe, layout, settings)
    with pytest.raises(BadInput, match=r"does not fit: its transformer takes 0\.0 GiB, and cpu has 0\.0"):
        Residency(torch.device("cpu"), lambda *_: None, capacity=size - 1).begin(pipe, layout, settings)


def test_a_stop_is_seen_before_a_part_works():
    pipe = WanPipeline.from_pretrained(demo.path())
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 3:
            raise InterruptedError

    Residency(torch.device("cpu"), lambda *_: None, check).attach(pipe)
    with pytest.raises(InterruptedError):
        run(pipe)
    assert len(calls) == 3


def test_the_estimate_grows_with_the_video(pipe):
    small = working_memory(pipe, VideoLayout(3, 4, 4), Settings("x", frames=9, height=64, width=64))
    large = working_memory(pipe, VideoLayout(3, 8, 8), Settings("x", frames=9, height=128, width=128))
    assert large["transformer"] == 4 * small["transformer"] and large["vae"] == 4 * small["vae"]


def test_the_estimate_has_room_for_what_stands_for_skipped_keys(pipe):
    layout, settings = VideoLayout(9, 12, 12), Settings("x", frames=33, height=192, width=192)
    dense = working_memory(pipe, layout, settings)
    assert working_memory(pipe, layout, settings, SVG(density=0.3)) == dense
    config = pipe.transformer.config
    for method in (Tangent(), SVG2(density=0.3, compensate=True)):
        q, k, v = torch.randn(3, 1, config.num_attention_heads, layout.tokens, config.attention_head_dim)
        memory = PlanMemory()
        made = method.plan(q, k, v, layout, memory).skipped
        tables = sum(x.nbytes for x in vars(made).values() if x is not None)
        kept = sum(x.nbytes for x in tree_leaves(memory.call) if isinstance(x, torch.Tensor))
        for scale, branches in ((1.0, 1), (5.0, 2)):
            more = working_memory(pipe, layout, replace(settings, guidance_scale=scale), method)
            assert more["vae"] == dense["vae"]
            assert more["transformer"] - dense["transformer"] == tables + config.num_layers * branches * kept
            assert tables and kept


def test_the_estimate_of_a_deep_compression_autoencoder(pipe):
    vae = AutoencoderDCV(latent_channels=8, block_out_channels=(8, 16, 16), layers_per_block=(0, 1, 1), chunk_size=8)
    other = WanPipeline(**{**pipe.components, "vae": vae}, **{k: pipe.config[k] for k in ("boundary_ratio",)})
    asked = working_memory(other, VideoLayout(2, 16, 16), Settings("x", frames=8, height=64, width=64))
    assert asked["vae"] == memory_to_decode(vae, 8, 64, 64)
    # The canvas counts, not the part of it that is asked for.
    assert working_memory(other, VideoLayout(2, 16, 16), Settings("x", frames=8, height=61, width=50)) == asked
    vae.enable_tiling(32, 32)
    assert (
        working_memory(other, VideoLayout(2, 16, 16), Settings("x", frames=8, height=64, width=64))["vae"]
        < 0.5 * (asked["vae"])
    )


def test_the_preview_shows_the_middle_frame_of_the_denoised_video(pipe):
    latents = []
    run(pipe, callback_on_step_end=lambda p, i, t, kw: latents.append(preview_latent(p, kw["latents"])) or {})
    assert [tuple(latent.shape) for latent in latents] == [(1, 8, 1, 8, 8)] * 2
    assert decodes_quickly(pipe)
    pictures = [decode_frame(pipe, latent) for latent in latents]
    assert all(p.shape == (64, 64, 3) and p.min() >= 0 and p.max() <= 1 for p in pictures)
    # The scheduler's estimate of the clean video, not the noisy latents: noise would decode to a busy picture.
    noise = decode_frame(pipe, torch.randn_like(latents[0]))
    assert pictures[0].diff(dim=0).abs().mean() < noise.diff(dim=0).abs().mean()
