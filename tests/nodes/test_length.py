"""LoRAs for longer videos in the pipelines of nodes: their attention comes with them."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel
from length_adapters import write_length

from vidaccel import demo
from vidaccel.generation.requests.settings import Settings
from vidaccel.nodes.pipeline.acceleration import Acceleration
from vidaccel.nodes.pipeline.generating import generate
from vidaccel.nodes.pipeline.loras import Lora
from vidaccel.nodes.pipeline.pipelines import load
from vidaccel.nodes.pipeline.residency import Residency
from vidaccel.nodes.report.wording import InputError


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    transformer = WanTransformer3DModel.from_pretrained(demo.path(), subfolder="transformer")
    file = write_length(tmp_path_factory.mktemp("lora"), demo.path(), transformer, frames=3)
    return load("demo", "auto", Residency(torch.device("cpu"), lambda *_: None), (Lora(file),))


def settings(frames: int = 9) -> Settings:
    return Settings("a red circle", frames=frames, height=32, width=32, steps=2)


def test_generate_video_uses_the_attention_of_the_file(pipeline):
    made = generate(pipeline, settings(), on_step=lambda *_: None)
    report = made.report.news().report
    assert report.method == "radial" and {r.reason for r in report.records} == {"", "first layers"}


def test_another_attention_and_longer_videos_are_refused(pipeline):
    with pytest.raises(
        InputError, match="was trained for one attention alone .radial at .*leave Accelerate Pipeline out"
    ):
        pipeline.accelerated(Acceleration())
    with pytest.raises(InputError, match="4 latent frames, and transformer.safetensors was trained up to 3"):
        generate(pipeline, settings(13), on_step=lambda *_: None)
