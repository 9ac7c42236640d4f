"""The command line on a pipeline that is not Wan's."""

from __future__ import annotations

import pytest
import torch
from families.cogvideo import cogvideox_2b

from vidaccel.generation.media.video_reader import read_video


@pytest.fixture(scope="module")
def cogvideox(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny-cogvideox"
    cogvideox_2b().save_pretrained(folder)
    return folder


def test_a_video_and_what_is_refused(vidaccel, cogvideox, tmp_path):
    """Frames and size are the model's own, and so is the rate."""
    out = tmp_path / "out.mp4"
    asked = ["generate", "a dot", "--model", cogvideox, "--out", out, "--device", "cpu", "--steps", 2]
    done = vidaccel(*asked, "--pipeline-option", "use_dynamic_cfg=true")
    assert done.exit_code == 0, done.output
    frames, rate = read_video(out)
    assert frames.shape == (9, 64, 64, 3) and rate == 8
    for given, message in (
        (["--frames", 12], "--frames is 12: this model makes 8k+1 frames"),
        (["--pipeline-option", "use_dynamic_cfg"], "--pipeline-option is use_dynamic_cfg: it has the form"),
        (["--pipeline-option", "height=64"], "--pipeline-option is height=64: --height decides it"),
    ):
        failed = vidaccel(*asked, *given)
        assert failed.exit_code == 2 and message in " ".join(failed.output.split()), failed.output


def test_a_forecast_counts_the_text(vidaccel, cogvideox):
    told = " ".join(vidaccel("info", "--forecast", "--model", cogvideox).output.split())
    assert "tokens 274 (3 x 4 x 4, and 226 beside them)" in told
