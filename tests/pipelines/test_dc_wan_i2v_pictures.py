"""Image to video with an image encoder: pictures, tensors and arrays are the same to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_dc import generate_dc, make_clip, make_dc_pipe, make_dc_transformer, make_picture

from vidaccel.pipelines import DCVideoGenImageToVideoPipeline


@pytest.mark.parametrize("last", [False, True])
def test_the_image_encoder_sees_the_same_picture_in_every_form(last):
    """Its own processor would divide numbers in [0, 1] by 255."""
    transformer = make_dc_transformer(image=True, image_dim=80)
    pipe = make_dc_pipe(DCVideoGenImageToVideoPipeline, transformer=transformer, **make_clip())
    picture = make_picture(32, 64)
    array = np.array(picture).astype(np.float32) / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1)[None]
    wanted = pipe.encode_image([picture, picture] if last else picture)
    assert wanted.shape[0] == 1 + last
    for image in (tensor, tensor[0], tensor * 2 - 1, tensor.double(), array, array[None]):
        torch.testing.assert_close(pipe.encode_image([image, image] if last else image), wanted)
    if not last:
        video = generate_dc(pipe, 8, 32, 64, image=picture)
        torch.testing.assert_close(generate_dc(pipe, 8, 32, 64, image=tensor), video, atol=1e-4, rtol=1e-4)
