"""Pictures and videos that a video starts from: what is taken, how much of it is read, and what is refused before."""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vidaccel
from vidaccel.generation.errors import BadInput
from vidaccel.generation.media.pictures import fit_picture
from vidaccel.generation.media.video import encoder, write_mp4
from vidaccel.generation.media.video_reader import read_video
from vidaccel.generation.models.inspected import inspect_model
from vidaccel.generation.requests.inputs import open_picture, open_video
from vidaccel.generation.requests.settings import Settings

PROMPT = "a red circle moves left on a grey background"
SMALL = {"height": 64, "width": 64, "steps": 3, "device": "cpu", "progress": False}


@pytest.fixture
def noise() -> np.ndarray:
    """`[33, 64, 64, 3]` uint8, which is large however it is encoded."""
    return np.random.default_rng(0).integers(0, 256, (33, 64, 64, 3), np.uint8)


@pytest.fixture
def cut_short(noise, tmp_path) -> Path:
    """A file whose index tells of 33 frames and whose last three quarters are zeros."""
    data = write_mp4(noise, tmp_path / "whole.mp4").read_bytes()
    path = tmp_path / "cut_short.mp4"
    path.write_bytes(data[: len(data) // 4] + bytes(len(data) - len(data) // 4))
    return path


# -- how much of a file is read ----------------------------------------------------------------------------------------


def test_only_the_frames_that_are_used_are_decoded(cut_short):
    source = open_video(cut_short)
    assert source.frames == 33
    read, _ = source.read(5, 64, 64)
    assert np.array_equal(read, read_video(cut_short.with_name("whole.mp4"))[0][:5])
    with pytest.raises(BadInput, match=r"^video cannot be used: .*cut_short\.mp4 cannot be decoded"):
        source.read(33, 64, 64)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"height": 100}, r"^height is 100: it must be a multiple of 16"),
        ({"frames": 34}, r"^frames is 34: the input video has 33"),
        ({"frames": 31}, r"^frames is 31: this model makes 4k\+1 frames"),
        ({"strength": 0.3}, r"^strength is 0\.3: "),
        ({}, r"^video cannot be used: "),
    ],
)
def test_a_request_is_checked_before_its_video_is_decoded(loads_nothing, cut_short, given, message):
    with pytest.raises(BadInput, match=message):
        vidaccel.generate("demo", PROMPT, video=cut_short, **{**SMALL, **given})


def test_a_file_is_scaled_and_cut_as_pictures_are(tmp_path):
    y, x = np.mgrid[:60, :100]
    frames = np.stack([np.stack([2 * x, 4 * y, np.full_like(x, 10 * i)], -1) for i in range(6)]).astype(np.uint8)
    read, notes = open_video(write_mp4(frames, tmp_path / "wide.mp4")).read(5, 64, 48)
    whole, _ = read_video(tmp_path / "wide.mp4")
    wanted = [fit_picture(Image.fromarray(frame), 64, 48) for frame in whole[:5]]
    assert read.shape == (5, 48, 64, 3) and read.dtype == np.uint8
    assert np.abs(read.astype(int) - np.stack([np.asarray(picture) for picture, _ in wanted])).max() <= 3
    assert notes == ("video: of its 6 frames, the first 5 are used.", f"video: {wanted[0][1]}")
    assert "8 columns at the left and 8 columns at the right" in notes[1]


# -- strength ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "strength", "least"), [(3, 0.3, 0.334), (1, None, 1.0), (49, 0.02, 0.021), (2000, 0.0004, 0.0005)]
)
def test_the_least_strength_is_named(noise, steps, strength, least):
    """None is diffusers' own, 0.8: of one step that is none."""
    settings = Settings(PROMPT, video=noise[:5], steps=steps, strength=strength, height=64, width=64)
    facts = inspect_model("demo", video=True)
    with pytest.raises(BadInput, match=f"with steps {steps} it leaves no step to make. Give {least:g} or more") as bad:
        settings.checked(facts)
    assert bad.value.field == "strength" and bad.value.value == (strength or 0.8)
    assert Settings(PROMPT, video=noise[:5], steps=steps, strength=least).checked(facts).strength == least


def test_the_least_strength_works(noise):
    made = vidaccel.generate("demo", PROMPT, video=noise[:5], strength=0.334, **SMALL)
    assert made.frames.shape == (5, 64, 64, 3)


@pytest.fixture
def uneven(tmp_path) -> Path:
    """31 frames whose grey tells when: a second at 20 frames a second, a second of one frame, half a second at 20."""
    command = [encoder(), "-loglevel", "error", "-f", "lavfi", "-i"]
    command += ["color=black:s=64x64:r=20,format=gray,geq=lum='4*N',trim=end_frame=50"]
    command += ["-vf", "select='lt(n,20)+eq(n,20)+gte(n,40)'", "-fps_mode", "vfr", "-crf", "4", tmp_path / "uneven.mkv"]
    subprocess.run([str(part) for part in command], check=True)
    return tmp_path / "uneven.mkv"


def test_motion_keeps_its_pace_where_the_rate_varies(uneven):
    """The result has one rate, so it is from moments as far apart as those of its frames."""
    source = open_video(uneven)
    read, notes = source.read(31, 64, 64)
    moments, wanted = read.mean((1, 2, 3)) / 4 / 20, np.arange(31) / 12.4
    wanted[(wanted > 1) & (wanted < 2)] = 1  # the frame that is shown for a second
    assert source.frames == 31 and source.fps == pytest.approx(12.4)
    assert np.abs(moments - wanted).max() < 0.06
    assert notes == (
        "video: its frames are not evenly spaced in time: it is sampled at its mean rate, 12.4 frames per second.",
    )
    read, notes = source.read(13, 64, 64)
    assert len(read) == 13 and notes[0] == "video: of its 2.5 s, the first 1.05 s are used."
    checked = Settings(PROMPT, video=uneven, height=64, width=64).checked(inspect_model("demo", video=True))
    assert checked.frames == 29 and checked.fps == pytest.approx(12.4)
    assert [note.split(" ")[1] for note in checked.notes] == ["the", "of", "its"]


# -- frames per second -------------------------------------------------------------------------------------------------


def test_the_rate_is_that_of_the_input_video(noise, tmp_path):
    video = write_mp4(noise[:5], tmp_path / "in.mp4", 30000 / 1001)
    made = vidaccel.generate("demo", PROMPT, video=video, out=tmp_path / "out.mp4", **SMALL)
    assert made.fps == read_video(tmp_path / "out.mp4")[1] == 30000 / 1001
    assert made.notes == ("video: the result has its 29.97 frames per second.",)
    facts = inspect_model("demo", video=True)
    named = Settings(PROMPT, video=video, fps=8).checked(facts)
    assert named.fps == 8 and not any("per second" in note for note in named.notes)
    assert Settings(PROMPT, video=noise[:5]).checked(facts).fps == 16
    assert Settings(PROMPT).checked(inspect_model("demo")).fps == 16


def test_a_rate_that_cannot_be_kept_is_to_be_named(noise, tmp_path):
    video = write_mp4(noise[:5], tmp_path / "slow.mp4", 0.5)
    facts = inspect_model("demo", video=True)
    with pytest.raises(BadInput, match=r"^fps is missing: the input video has 0\.5 frames per second"):
        Settings(PROMPT, video=video).checked(facts)
    assert Settings(PROMPT, video=video, fps=2).checked(facts).fps == 2


# -- what is taken -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        lambda frames: [Image.fromarray(frame) for frame in frames],
        lambda frames: tuple(frames),
        lambda frames: frames / 255,
        lambda frames: (frames / 255).astype(np.float32),
        torch.from_numpy,
        lambda frames: torch.from_numpy(frames) / 255,
        lambda frames: [torch.from_numpy(frame) for frame in frames],
    ],
)
def test_a_video_in_memory(noise, given):
    assert np.array_equal(open_video(given(noise)).given, noise)


@pytest.mark.parametrize("given", [lambda frame: frame, lambda frame: frame / 255, torch.from_numpy, Image.fromarray])
def test_a_picture_in_memory(noise, given):
    assert np.array_equal(np.asarray(open_picture("image", given(noise[0]))), noise[0])


def test_a_pil_picture_is_as_one_from_a_file(tmp_path, caplog):
    """Transparent, turned, grey, 16 bits: what the pipeline gets is upright, opaque and RGB."""
    caplog.set_level(logging.WARNING)
    exif = Image.Exif()
    exif[274] = 6
    clear = Image.new("RGBA", (64, 32), (255, 0, 0, 0))
    clear.save(tmp_path / "turned.png", exif=exif)
    for picture in (Image.open(tmp_path / "turned.png"), Image.open(tmp_path / "turned.png").convert("LA")):
        shown = open_picture("image", picture)
        assert (shown.mode, shown.size, shown.getpixel((2, 2))) == ("RGB", (32, 64), (255, 255, 255))
    wide = Image.fromarray(np.full((8, 8), 65535 // 2, np.uint16))
    assert open_picture("image", wide).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.zeros((5, 8, 8), np.uint8), r"is uint8 \[5, 8, 8\]: it must be .* \[F, H, W, 3\] of bytes or of floats"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"is uint8 \[0, 8, 8, 3\]"),
        (np.zeros((5, 3, 8, 8), np.float32), r"is float32 \[5, 3, 8, 8\]"),
        (np.full((5, 8, 8, 3), -1.0), r"is float64 \[5, 8, 8, 3\] from -1 to -1"),
        (np.full((5, 8, 8, 3), np.nan), "is float64 .* from nan to nan"),
        (np.zeros((5, 8, 8, 3), np.int64), "is int64"),
        ([], r"is uint8 \[0, 0, 0, 3\]: it must be a file, a list of pictures"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))], r"has pictures of several sizes \(8x8, 8x9\)"),
        ([1, 2], r"is int: each of its pictures must be a file, a PIL picture, or an array \[H, W, 3\]"),
        (["gone.png"], r"cannot be used: gone\.png: no such file"),
        (5, "is int: it must be a file"),
    ],
)
def test_what_is_no_video(loads_nothing, given, words):
    with pytest.raises(BadInput, match=f"^video {words}"):
        vidaccel.generate("demo", PROMPT, video=given, **SMALL)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.zeros((1, 8, 8, 3), np.uint8), r"is uint8 \[1, 8, 8, 3\]: it must be a file, a PIL picture, or an array"),
        (5, "is int"),
        (Image.fromarray(np.ones((4, 4), np.float32)), "cannot be used: its numbers are in floating point"),
    ],
)
def test_what_is_no_picture(given, words):
    with pytest.raises(BadInput, match=f"^image {words}"):
        open_picture("image", given)


# -- kinds of values ---------------------------------------------------------------------------------------------------


def test_kinds_that_are_harmless():
    settings = Settings(
        PROMPT,
        None,
        frames=5.0,
        height=np.int64(64),
        width=np.float32(64),
        steps=3.0,
        guidance_scale=2,
        seed=7.0,
        fps=12,
    )
    values = [
        getattr(settings, name) for name in ("frames", "height", "width", "steps", "seed", "guidance_scale", "fps")
    ]
    assert values == [5, 64, 64, 3, 7, 2.0, 12.0] and [type(v) for v in values] == [int] * 5 + [float] * 2
    assert settings.negative_prompt == ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"frames": "5"}, r"^frames is '5': it must be a whole number\.$"),
        ({"frames": 5.5}, r"^frames is 5\.5: it must be a whole number\.$"),
        ({"frames": True}, r"^frames is True: it must be a whole number\.$"),
        ({"height": float("inf")}, r"^height is inf: it must be a whole number"),
        ({"width": [64]}, r"^width is \[64\]: it must be a whole number"),
        ({"steps": float("nan")}, r"^steps is nan: it must be a whole number"),
        ({"seed": 1.5}, r"^seed is 1\.5: it must be a whole number"),
        ({"seed": None}, r"^seed is None: it must be a whole number"),
        ({"guidance_scale": "2"}, r"^guidance_scale is '2': it must be a number"),
        ({"fps": "16"}, r"^fps is '16': it must be a number"),
        ({"fps": 0.1}, r"^fps is 0\.1: it must be at least 1 and at most 240"),
        ({"strength": "half"}, r"^strength is 'half': it must be a number"),
        ({"negative_prompt": ["x"]}, r"^negative_prompt is \['x'\]: it must be one text"),
        ({"out": 5}, r"^out is 5: it must be the name of a file"),
        ({"report": 5, "compare": True}, r"^report is 5: it must be the name of a file"),
        ({"density": "0.3", "method": "svg"}, r"^density is '0\.3': it must be a number"),
        ({"dense_steps": -1, "method": "svg"}, r"^dense_steps is -1: it is a count \(a whole number from 0\) or"),
        ({"dense_layers": 1.5, "method": "svg"}, r"^dense_layers is 1\.5: it is a count"),
        ({"dense_layers": "2", "method": "svg"}, r"^dense_layers is '2': it is a count"),
        ({"settings": {"svg": 3}, "method": "svg"}, r"^settings is \{'svg': 3\}: they must be settings by method"),
        ({"settings": [1], "method": "svg"}, r"^settings is \[1\]: they must be settings by method"),
        ({"backend": None}, r"^backend is None: it must be one text"),
        ({"device": None}, r"^device is None: torch knows no such device"),
        ({"dtype": torch.int8}, r"^dtype is int8: it must be auto"),
        ({"rope": None}, r"^rope is None: it must be one text"),
        ({"tiling": "no"}, r"^tiling is 'no': it must be True or False\.$"),
        ({"compare": "yes"}, r"^compare is 'yes': it must be True or False"),
        ({"lora": "x" * 300}, r"^lora is x*\.\.\.: the name is too long for this system"),
        ({"sla": "x" * 300}, r"^sla is x*\.\.\.: the name is too long for this system"),
        ({"guidance_free": "x" * 300}, r"^guidance_free is x*\.\.\.: the name is too long for this system"),
        ({"preset": "x" * 300}, r"^preset cannot be used: there is no preset x"),
        ({"decoder": "x" * 300}, r"^decoder cannot be used: x.* there is no such file or folder"),
        ({"decoder": "own"}, r"^decoder cannot be used: demo has no tiny decoder of its own"),
        ({"sla": 5}, r"^sla is 5: it must be a file or a folder, or several in a list"),
        ({"guidance_free": [5]}, r"^guidance_free is \[5\]: it must be a file or a folder"),
        ({"preset": {"name": "a"}}, r"^preset is .*: it must be a Preset, a file, .* Preset\.from_dict makes one"),
        (
            {"preset": 5},
            r"^preset is 5: it must be a Preset, a file, or the name of one that comes with the package\.$",
        ),
    ],
)
def test_kinds_that_cannot_be_meant(loads_nothing, given, message):
    with pytest.raises(BadInput, match=message):
        vidaccel.generate("demo", PROMPT, **{**SMALL, **given})


def test_no_adapter_may_be_none():
    from vidaccel.generation.job import prepare
    from vidaccel.generation.requests.sparse import Sparse

    job = prepare("demo", Settings(PROMPT), Sparse(), device="cpu", lora=None, guidance_free=None, sla=None)
    assert job.guidance_free == job.sla == job.loras == ()


def test_a_file_may_lie_in_the_home(noise, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_mp4(noise, tmp_path / "clip.mp4")
    for field in ("image", "last_image", "video", "face_video"):
        assert getattr(Settings(PROMPT, **{field: "~/clip.mp4"}), field) == tmp_path / "clip.mp4"
    Image.fromarray(noise[0]).save(tmp_path / "a.png")
    assert np.array_equal(open_video(["~/a.png"]).given, noise[:1])
    with pytest.raises(BadInput, match=r"^image is ~nobody-of-this-name: there is no such file"):
        Settings(PROMPT, image="~nobody-of-this-name")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
def test_pipes_and_folders_are_there_and_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(
        BadInput, match=r"pipe\.mp4: it is a pipe or a device, and a file is read more than once\. Save"
    ):
        Settings(PROMPT, video=tmp_path / "pipe.mp4")
    with pytest.raises(BadInput, match=r"^image is .*: it is a folder\. Give a file\."):
        Settings(PROMPT, image=tmp_path)


def test_a_prompt_is_one_text(loads_nothing):
    for prompt in (["one", "two"], None):
        with pytest.raises(BadInput, match=r"^prompt is .*: it must be one text"):
            vidaccel.generate("demo", prompt, **SMALL)


def test_what_is_no_model(loads_nothing):
    for model in (5, None):
        with pytest.raises(BadInput, match=r"^model is .*: it is a .*, which is not supported"):
            vidaccel.generate(model, PROMPT, **{**SMALL, "device": "auto"})
