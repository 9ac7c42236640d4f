"""Videos of ComfyUI's own kinds, as *Generate Video* takes them."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from native_comfyui import nodes  # noqa: F401 - skips without a ComfyUI

from vidaccel.nodes.pipeline.inputs import first_frames

impl = pytest.importorskip("comfy_api.latest").InputImpl


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """200 frames, the first of which are slow."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=30)
        stream.width = stream.height = 32
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 30)
        for number in range(200):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), number, np.uint8), format="rgb24")
            frame.pts = 10 * number if number < 12 else 120 + number
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return str(path)


@pytest.mark.parametrize("most", [1, 5, 9, 60, 199, 200, 300])
def test_the_first_frames_of_a_file(film, most):
    video = impl.VideoFromFile(film)
    whole = video.get_components().images
    found = first_frames(video, True, most)
    assert len(whole) == 200 and len(found) >= min(200, most + 1)
    assert torch.equal(found[:most], whole[:most])
    assert len(found) == 200 or most <= 60
    part = video.as_trimmed(1.0, 1.5)
    assert torch.equal(first_frames(part, True, most)[:most], part.get_components().images[:most])
