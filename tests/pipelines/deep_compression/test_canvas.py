from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vidaccel.pipelines.deep_compression.canvas import Canvas

WAN = {"patch": (1, 1, 1), "spatial": 32, "temporal": 4}


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        ((80, 480, 832), (80, 480, 832)),
        ((81, 720, 1280), (84, 736, 1280)),
        ((80, 2160, 3840), (80, 2176, 3840)),
        ((1, 1, 1), (4, 32, 32)),
        ((79, 481, 833), (80, 512, 864)),
    ],
)
def test_sizes_at_32_and_4(asked, made):
    canvas = Canvas.for_video(*asked, **WAN)
    assert (canvas.frames, canvas.height, canvas.width) == made
    assert canvas.latent_frames == made[0] // 4
    assert canvas.is_larger == (asked != made) and canvas.is_larger_in_space == (asked[1:] != made[1:])


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (2, 2, 1)])
@pytest.mark.parametrize(("spatial", "pad"), [(32, 0), (64, 0), (16, 3), (4, 0), (2, 5)])
def test_the_canvas_fits_the_model_and_is_no_larger_than_needed(patch, spatial, pad):
    for asked in range(1, 200, 7):
        canvas = Canvas.for_video(asked, asked, asked + 3, patch=patch, spatial=spatial, temporal=4, pad_frames=pad)
        assert (canvas.frames + pad) == canvas.latent_frames * 4 and canvas.latent_frames % patch[0] == 0
        assert 0 <= canvas.frames - asked < 4 * patch[0]
        for value, wanted, step in ((canvas.height, asked, patch[1]), (canvas.width, asked + 3, patch[2])):
            # 16 is diffusers' own condition.
            assert value % (spatial * step) == 0 and value % 16 == 0
            assert 0 <= value - wanted < max(spatial * step, 16)
        # What diffusers makes of it: (frames - 1) // 4 + 1 latent frames.
        assert canvas.causal_frames % 4 == 1 and (canvas.causal_frames - 1) // 4 + 1 == canvas.latent_frames


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((0, 32, 32), "num_frames is 0"),
        ((4, -1, 32), "height is -1"),
        ((4, 32, 0), "width is 0"),
        ((4, 32.0, 32), "height is 32.0"),
    ],
)
def test_sizes_under_one_are_refused(asked, message):
    with pytest.raises(ValueError, match=f"{message}: it must be at least 1"):
        Canvas.for_video(*asked, **WAN)


def test_margins_are_equal_to_a_pixel():
    canvas = Canvas.for_video(4, 33, 60, **WAN)
    assert canvas.margins == (2, 2, 15, 16)
    assert canvas.asked_width + sum(canvas.margins[:2]) == 64 and canvas.asked_height + sum(canvas.margins[2:]) == 64


def test_every_form_of_video_is_cropped_alike():
    canvas = Canvas.for_video(6, 33, 60, **WAN)
    video = np.random.default_rng(0).integers(0, 256, (2, 8, 64, 64, 3), dtype=np.uint8)
    wanted = video[:, :6, 15:48, 2:62]
    assert (canvas.crop(video) == wanted).all()
    tensors = torch.from_numpy(video).permute(0, 1, 4, 2, 3)
    assert canvas.crop(tensors).permute(0, 1, 3, 4, 2).equal(torch.from_numpy(wanted))
    pictures = canvas.crop([[Image.fromarray(frame) for frame in one] for one in video])
    assert (np.stack([np.stack([np.asarray(frame) for frame in one]) for one in pictures]) == wanted).all()


def test_nothing_is_cropped_from_a_canvas_that_fits():
    canvas = Canvas.for_video(8, 64, 32, **WAN)
    video = torch.rand(1, 8, 3, 64, 32)
    assert canvas.margins == (0, 0, 0, 0) and canvas.crop(video).equal(video)


def test_it_says_what_is_made():
    assert str(Canvas.for_video(81, 720, 1280, **WAN)) == (
        "81 frames of 1280x720 were asked for; 84 of 1280x736 are made, the next size that the model can do, and "
        "cropped."
    )


def test_the_grid_of_tokens():
    """DC-VideoGen's own figures at 720p: 20 x 23 x 40 of 32 pixels."""
    assert Canvas.for_video(80, 720, 1280, **WAN).tokens((1, 1, 1), 32) == (20, 23, 40)
    assert Canvas.for_video(80, 704, 1280, **{**WAN, "patch": (1, 2, 2)}).tokens((1, 2, 2), 32) == (20, 11, 20)
