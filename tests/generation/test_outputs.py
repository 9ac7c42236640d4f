"""Files that cannot be written are refused before weights are read: all of them, not only the one that was named."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vidaccel
from vidaccel.generation.errors import BadInput
from vidaccel.generation.media.video import write_mp4
from vidaccel.generation.outputs import check_file, check_files
from vidaccel.generation.requests.local_files import local_files

PROMPT = "a red circle moves left on a grey background"
CHOSEN = {"frames": 5, "height": 64, "width": 64, "steps": 2, "device": "cpu", "progress": False}


@pytest.mark.parametrize(
    ("in_the_way", "given", "field"),
    [
        ("clip.svg.mp4", {"out": "clip.mp4"}, "out"),
        ("clip.dense.mp4", {"out": "clip.mp4"}, "out"),
        ("page.json", {"out": "clip.mp4", "report": "page.html"}, "report"),
        ("page.png", {"report": "page.html"}, "report"),
        ("page.dense.mp4", {"report": "page.html"}, "report"),
    ],
)
def test_a_folder_in_the_way_of_a_file_beside(loads_nothing, tmp_path, in_the_way, given, field):
    (tmp_path / in_the_way).mkdir()
    files = {name: tmp_path / file for name, file in given.items()}
    with pytest.raises(BadInput) as refused:
        vidaccel.generate("demo", PROMPT, method=["random", "svg"], compare=True, **files, **CHOSEN)
    assert str(refused.value) == (
        f"{field} is {files[field]}: {in_the_way}, which is written for it, is a folder. Give another name."
    )
    assert [file.name for file in tmp_path.iterdir()] == [in_the_way]


def test_a_file_that_is_read_is_not_replaced(loads_nothing, tmp_path):
    video = write_mp4(np.zeros((5, 64, 64, 3), np.uint8), tmp_path / "clip.mp4")
    with pytest.raises(BadInput, match=r"^out is .*clip\.mp4: it is the file that video reads\. Give another name\.$"):
        vidaccel.generate("demo", PROMPT, video=video, out=tmp_path / "clip.mp4", **CHOSEN)


def test_the_numbers_of_a_page_do_not_replace_a_preset(loads_nothing, tmp_path):
    preset, page = tmp_path / "mine.json", tmp_path / "mine.html"
    preset.write_text('{"version": 1, "name": "mine", "cache": {"name": "forecast"}}')
    with pytest.raises(BadInput, match=r"mine\.json, which is written for it, is the file that preset reads"):
        vidaccel.generate("demo", PROMPT, preset=preset, method="svg", compare=True, report=page, **CHOSEN)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.json"]


def test_all_local_files_of_a_request_are_known(tmp_path):
    """By their fields, also those that a preset names."""
    from vidaccel.generation.job import prepare
    from vidaccel.generation.requests.settings import Settings
    from vidaccel.generation.requests.sparse import Sparse

    picture, adapter = tmp_path / "first.png", vidaccel.demo.few_steps()[0]
    Image.new("RGB", (64, 64)).save(picture)
    decoder = vidaccel.demo.path("demo-dc") / "tiny_decoder"
    preset = vidaccel.Preset(name="mine", guidance_free=(str(adapter),), decoder=str(decoder))
    model = str(vidaccel.demo.path("demo-dc"))
    inputs = prepare(model, Settings(PROMPT), Sparse(), device="cpu", preset=preset).inputs
    assert inputs == {
        "model": (Path(model, "adapter.json"),),
        "guidance_free": (adapter,),
        "decoder": (decoder / "config.json",),
    }
    assert local_files({"image": picture, "lora": [str(picture), "gone.safetensors"], "video": np.zeros(3)}) == {
        "image": (picture,),
        "lora": (picture,),
    }


def test_the_contact_sheet_does_not_replace_a_picture(tmp_path):
    """By whatever name: links are followed."""
    Image.new("RGB", (8, 8)).save(tmp_path / "first.png")
    (tmp_path / "page.png").symlink_to("first.png")
    page = tmp_path / "page.html"
    with pytest.raises(BadInput, match=r"page\.png, which is written for it, is the file that image reads"):
        check_files("report", page, [page, tmp_path / "page.png"], {"image": [tmp_path / "first.png"]})


def test_names_that_are_too_long_with_what_is_added(loads_nothing, tmp_path):
    out = tmp_path / f"{'x' * 235}.mp4"
    with pytest.raises(
        BadInput, match=r"x\.dense\.mp4, which is written for it, cannot be written \(the system says: "
    ):
        vidaccel.generate("demo", PROMPT, method=["svg", "random"], compare=True, out=out, **CHOSEN)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def no_room():
    """Files can be made, and take nothing, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_known_before_the_steps(no_room, tmp_path):
    out, full = tmp_path / "clip.mp4", r"\(the system says: File too large\)"
    with pytest.raises(BadInput, match=rf"^out is .*clip\.mp4: the folder .* is not writable {full}"):
        check_file("out", out, ".mp4")
    with pytest.raises(BadInput, match=rf"^out is .*clip\.mp4: it cannot be written {full}"):
        check_files("out", out, [out], {})
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_there_are_replaced(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"old")
    check_files("out", tmp_path / "clip.mp4", [tmp_path / "clip.mp4"], {})
    assert (tmp_path / "clip.mp4").read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]


def test_a_pipe_takes_pages_and_no_mp4(loads_nothing, tmp_path):
    """The encoder failed at it after the steps."""
    out, page = tmp_path / "clip.mp4", tmp_path / "page.html"
    os.mkfifo(out)
    os.mkfifo(page)
    with pytest.raises(BadInput, match=r"^out is .*clip\.mp4: it is a pipe, and an MP4 is not written from its beginn"):
        vidaccel.generate("demo", PROMPT, out=out, **CHOSEN)
    with pytest.raises(BadInput, match=r"^report is .*clip\.mp4, which is written for it, is a pipe"):
        check_files("report", page, [page, out], {})
    check_file("report", page, ".html")
    check_files("report", page, [page], {})


@pytest.mark.skipif(not hasattr(os, "fork") or os.geteuid() != 0, reason="needs to become somebody else")
def test_room_is_not_looked_for_beside_a_device():
    """In /dev nobody but root makes files."""
    child = os.fork()
    if not child:
        os.setuid(65534)
        try:
            check_files("report", Path("/dev/null"), [Path("/dev/null")], {})
        except BadInput:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
