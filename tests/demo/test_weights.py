from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from transformers import UMT5EncoderModel

from vidaccel.demo import HELD_OUT_PROMPTS, path, world
from vidaccel.demo.checker import check
from vidaccel.demo.evaluate import contact_sheet, evaluate, sample


@pytest.fixture(scope="module")
def pipe():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = WanPipeline.from_pretrained(path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_shipped_folder_is_small_and_safe():
    files = [p for p in path().rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 14 * 2**20
    assert {p.suffix for p in files} == {".json", ".safetensors"}
    assert not any("_name_or_path" in p.read_text() for p in files if p.suffix == ".json")


def test_it_is_the_real_architecture_in_float32(pipe):
    assert type(pipe.transformer) is WanTransformer3DModel and type(pipe.vae) is AutoencoderKLWan
    assert type(pipe.text_encoder) is UMT5EncoderModel
    assert {pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    assert pipe.transformer.config.attention_head_dim == 64 and pipe.transformer.config.num_attention_heads == 3
    assert (pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal) == (8, 4)


def test_a_full_size_video_has_576_tokens(pipe):
    seen = []
    hook = pipe.transformer.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    video = sample(pipe, ["a red circle moves left on a grey background"], [0], steps=2)
    hook.remove()
    assert video.shape == (1, world.FRAMES, 3, world.HEIGHT, world.WIDTH)
    assert video.min() >= 0 and video.max() <= 1 and video.isfinite().all()
    assert seen[0] == (1, 576, 192)


def test_the_autoencoder_keeps_what_a_video_shows(pipe):
    scene = world.sample_scene(77)
    video = world.render(scene)
    with torch.no_grad():
        latents = pipe.vae.encode(video.transpose(0, 1)[None] * 2 - 1).latent_dist.mode()
        decoded = (pipe.vae.decode(latents).sample[0].transpose(0, 1) + 1) / 2
    assert latents.shape == (1, 8, 9, 16, 16)
    assert -10 * (decoded - video).square().mean().log10() > 26
    reading = check(decoded)
    assert (reading.shape, reading.colour, reading.motion) == scene.attributes[:3]


def test_held_out_prompts_are_followed(pipe):
    """Four prompts, one of each motion, in few steps; `python -m vidaccel.demo.evaluate` measures the whole list."""
    prompts = tuple(next(p for p in HELD_OUT_PROMPTS if f" {m} " in p) for m in world.MOTIONS)
    result, videos = evaluate(pipe, prompts, batch_size=4, steps=6)
    assert result["accuracy"]["all"] >= 0.75, result
    assert contact_sheet(videos).shape == (2 * 132, 2 * (5 * 128 + 8), 3)
