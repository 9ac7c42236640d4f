"""Loading a pipeline as the command line does."""

from __future__ import annotations

import pytest
import torch

from vidaccel import demo
from vidaccel.pipelines.loading import load_pipeline


@pytest.mark.parametrize(
    ("name", "dtype", "given", "expected"),
    [
        (demo.DC, torch.bfloat16, None, torch.bfloat16),
        (demo.DC, torch.float16, None, torch.float32),
        (demo.DC, torch.float32, None, torch.float32),
        (demo.DC, torch.bfloat16, torch.float32, torch.float32),
        ("demo", torch.bfloat16, None, torch.float32),
        ("demo", torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_dtype_of_the_autoencoder(name, dtype, given, expected):
    """DC-AE-V is published in bfloat16 and follows it; Wan's own stays in float32."""
    cls = "DCVideoGenPipeline" if name == demo.DC else "DiffusionPipeline"
    pipe = load_pipeline(demo.path(name), dtype, "cpu", pipeline_class=cls, autoencoder_dtype=given)
    assert {parameter.dtype for parameter in pipe.vae.parameters()} == {expected}
    assert pipe.transformer.dtype == dtype


def test_a_video_is_made_in_bfloat16():
    pipe = load_pipeline(demo.path(demo.DC), torch.bfloat16, "cpu", pipeline_class="DCVideoGenPipeline")
    size = {"height": 32, "width": 32, "num_frames": 8}
    video = pipe("a red circle", **size, num_inference_steps=1, output_type="pt").frames
    assert video.shape[1:] == (8, 3, 32, 32) and video.isfinite().all()
