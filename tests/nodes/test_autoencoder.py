"""DC-AE-V with the calls that ComfyUI makes, without a ComfyUI."""

from __future__ import annotations

import pytest
import torch

from vidaccel import demo
from vidaccel.generation.errors import BadInput
from vidaccel.nodes.autoencoder import BUILT_IN, LatentScale, load
from vidaccel.nodes.report.wording import InputError


def test_a_picture_of_which_nothing_is_left_is_refused():
    """ComfyUI cuts the sides to multiples of what the autoencoder takes."""
    module = LatentScale(load(BUILT_IN)).eval()
    factor = module.autoencoder.spatial_compression_ratio
    with torch.inference_mode():
        assert module.encode(torch.zeros(1, 3, 1, factor, 2 * factor)).shape[-2:] == (1, 2)
        for height, width in ((0, 0), (0, factor), (factor, 0)):
            with pytest.raises(InputError, match=rf"^pixels are narrower than {factor} .* at least {factor}x{factor}"):
                module.encode(torch.zeros(1, 3, 1, height, width))


def test_a_folder_of_which_there_is_a_variant_alone(tmp_path):
    load(BUILT_IN).half().save_pretrained(tmp_path, variant="fp16")
    assert load(tmp_path).dtype == torch.float32


def test_a_folder_of_something_else_is_told_as_what_it_is(tmp_path):
    for folder, words in (
        (demo.path() / "vae", "is of the class AutoencoderKLWan"),
        (demo.path(demo.DC), "is the folder of a pipeline: give that of its autoencoder, .*vae"),
        (tmp_path, "has no config.json: give a folder of an AutoencoderDCV, or a file"),
    ):
        with pytest.raises(BadInput, match=words):
            load(folder)
