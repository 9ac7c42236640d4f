"""Pipelines that are not Wan's, as the nodes run them."""

from __future__ import annotations

import pytest
import torch
from families import hunyuan, ltx

from vidaccel.generation.requests.settings import Settings
from vidaccel.nodes.pipeline.generating import generate
from vidaccel.nodes.pipeline.pipelines import load
from vidaccel.nodes.pipeline.previews import has_known_latents
from vidaccel.nodes.pipeline.residency import Residency

CPU = torch.device("cpu")


@pytest.mark.parametrize("build", [hunyuan.hunyuan_15, ltx.ltx])
def test_a_pipeline_of_another_family(build, tmp_path):
    """With a guider and without a callback; with a picture, in the pipeline that takes one."""
    torch.manual_seed(0)
    build().save_pretrained(tmp_path)
    moved = []
    pipeline = load(str(tmp_path), "auto", Residency(CPU, lambda part, memory: moved.append((part, memory))))
    assert not has_known_latents(pipeline.pipe)
    seen = []
    settings = Settings("a dot", frames=9, height=64, width=64, steps=2, guidance_scale=2.0)
    image = {"image": torch.rand(1, 48, 64, 3)} if build is ltx.ltx else {}
    made = generate(pipeline, settings, **image, on_step=lambda *told: seen.append(told[:2]))
    assert made.frames.shape == (9, 64, 64, 3) and made.fps == pipeline.facts.row.fps
    assert seen == [(1, 2), (2, 2)]
    assert dict(moved)[pipeline.pipe.transformer] > 0 and dict(moved)[pipeline.pipe.vae] > 0


def test_the_sound_of_a_model_that_makes_one(tmp_path):
    """As ComfyUI's AUDIO, as long as the video."""
    torch.manual_seed(0)
    ltx.ltx2().save_pretrained(tmp_path)
    made = load(str(tmp_path), "auto", Residency(CPU, lambda part, memory: None))
    options = {"spatio_temporal_guidance_blocks": [1]}
    settings = Settings("a dot", frames=9, height=64, width=64, steps=2, pipeline_options=options)
    result = generate(made, settings, on_step=lambda *told: None)
    sound, rate = result.audio["waveform"], result.audio["sample_rate"]
    assert sound.shape[:2] == (1, 2) and sound.dtype == torch.float32 and sound.abs().max() > 0
    assert 0 < sound.shape[2] <= round(9 / result.fps * rate)
