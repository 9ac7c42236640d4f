"""What a job is, for a reader: what it starts from among it, and the call that makes it again."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

import vidaccel
from vidaccel import SVG2, demo
from vidaccel.generation.job import prepare
from vidaccel.generation.media.video import write_mp4
from vidaccel.generation.report.described import call_text, described
from vidaccel.generation.requests.settings import Settings
from vidaccel.generation.requests.sparse import Sparse

PROMPT = "a red circle moves left on a grey background"


def test_the_size_and_what_the_video_starts_from_are_told(tmp_path):
    frames = np.zeros((9, 64, 64, 3), np.uint8)
    file = write_mp4(frames, tmp_path / "clip.mp4")
    for video, told in ((file, str(file)), (frames, "given in memory")):
        job = prepare("demo", Settings(PROMPT, video=video, height=64, width=64, strength=0.5), Sparse(), device="cpu")
        said = described(job)
        assert (said["size"], said["video"], said["strength"]) == ("9 frames of 64x64", told, "0.5")
    said = described(prepare("demo", Settings(PROMPT), Sparse(), device="cpu"))
    assert not {"video", "image", "strength"} & set(said)


def test_a_call_is_told_as_python_writes_it():
    def call(model, prompt, *, method=None, video=None, settings=None, out=None, seed=0, dtype="auto", steps=None):
        return call_text(call, locals())

    assert call("demo", "it's", seed=0) == """vidaccel.call('demo', "it's")"""
    text = call(
        Path("a b"), "dot", method=[SVG2(density=0.4), "svg"], settings={"svg": {"density": 0.3}}, out=Path("o.mp4")
    )
    written = "method=[SVG2(density=0.4), 'svg'], settings={'svg': {'density': 0.3}}, out='o.mp4')"
    assert text == f"vidaccel.call('a b', 'dot', {written}"
    pictures = [np.zeros((8, 8, 3), np.uint8)] * 81
    text = call(torch.nn.Identity(), "dot", video=pictures, dtype=torch.float32)
    assert text == "vidaccel.call(<Identity>, 'dot', video=<81 in a list>, dtype=torch.float32)"


def test_numbers_of_numpy_and_lists_of_lists_are_told_as_they_are():
    def call(*, seed, density, steps, boxes, scale):
        return call_text(call, locals())

    told = call(seed=np.int64(3), density=np.float64(0.2), steps=[np.int32(4), 5], boxes=[[1, 2], [3]], scale=math.inf)
    assert told == "vidaccel.call(seed=3, density=0.2, steps=[4, 5], boxes=[[1, 2], [3]], scale=float('inf'))"


def test_the_call_of_generate_is_one():
    import inspect

    given = {name: parameter.default for name, parameter in inspect.signature(vidaccel.generate).parameters.items()}
    text = call_text(vidaccel.generate, given | {"model": str(demo.path()), "prompt": PROMPT, "frames": 5})
    assert text == f"vidaccel.generate({str(demo.path())!r}, {PROMPT!r}, frames=5)"
