"""Loading a pipeline as the command line does."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import vidaccel
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


@pytest.mark.parametrize(("name", "cls"), [("demo", "WanPipeline"), (demo.DC, "DCVideoGenPipeline")])
def test_offloaded_by_blocks_it_makes_the_same_video(name, cls):
    """With the CPU on both sides: every part is where its inputs are, and attention is sparse all the same."""

    def made(offload):
        pipe = load_pipeline(demo.path(name), torch.float32, "cpu", pipeline_class=cls, offload=offload)
        size = {"height": 64, "width": 64, "num_frames": 9, "generator": torch.Generator().manual_seed(0)}
        with vidaccel.accelerate(pipe, "svg2") as handle:
            video = pipe("a red circle", **size, num_inference_steps=2, output_type="pt").frames
        assert any(not record.reason for record in handle.report().records)
        return pipe, video

    (pipe, offloaded), (_, whole) = made("blocks"), made(False)
    assert offloaded.equal(whole)
    blocks = pipe.transformer.blocks
    assert all(hasattr(block, "_diffusers_hook") for block in blocks)
    leaves = [m for m in pipe.text_encoder.modules() if isinstance(m, torch.nn.Linear)]
    assert leaves and all(hasattr(leaf, "_diffusers_hook") for leaf in leaves)


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_weights_that_a_file_lacks_are_named(part, tmp_path):
    folder = shutil.copytree(demo.path(), tmp_path / "model")
    file = folder / part / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    lost = next(name for name in sorted(weights) if weights[name].ndim >= 2)
    save_file({name: value for name, value in weights.items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(OSError, match=rf"^the weights in {re.escape(str(folder))}/{part} lack {lost} of this "):
        load_pipeline(str(folder), torch.float32, "cpu")
