"""MP4 files are whole or not there, play in browsers, and keep their colours."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest

from vidaccel.generation.api import check_outputs
from vidaccel.generation.media import video
from vidaccel.generation.media.files import Undecodable
from vidaccel.generation.media.video import EncodingError, contact_sheet, write_mp4
from vidaccel.generation.media.video_reader import read_video
from vidaccel.pipelines.files.whole_files import NotWritten


def test_round_trip(clip, tmp_path):
    path = write_mp4(clip, tmp_path / "clip.mp4", fps=12)
    read, fps = read_video(path)
    assert read.shape == clip.shape and fps == 12
    assert np.abs(read.astype(int) - clip).mean() < 4
    frames = imageio.imread(path, plugin="FFMPEG")  # as players scale colours
    # 4:2:0 blurs colour at edges; away from them a pixel is off by little, so neither matrix nor range is wrong.
    assert np.abs(frames.astype(int) - clip).mean() < 4
    assert np.abs(frames[0, 14, 8].astype(int) - 230).max() <= 3
    assert {f.name for f in tmp_path.iterdir()} == {"clip.mp4"}


@pytest.mark.parametrize("fps", [24000 / 1001, 30000 / 1001, 12.5, 1])
def test_the_rate_is_exact(clip, tmp_path, fps):
    assert read_video(write_mp4(clip, tmp_path / "clip.mp4", fps))[1] == fps


@pytest.mark.parametrize("colour", [(220, 30, 30), (30, 200, 60), (20, 40, 220), (0, 0, 0), (255, 255, 255)])
def test_colours(colour, tmp_path):
    frames = np.full((3, 32, 32, 3), colour, np.uint8)
    decoded, _ = read_video(write_mp4(frames, tmp_path / "c.mp4"))
    assert np.abs(decoded[1, 16, 16].astype(int) - colour).max() <= 4


def test_what_browsers_need(clip, tmp_path):
    """H.264 with 4:2:0 colour, BT.709, and the index before the data, so that playing starts before the end."""
    path = write_mp4(clip, tmp_path / "clip.mp4")
    told = subprocess.run([video.encoder(), "-i", str(path)], capture_output=True, text=True).stderr
    assert "Video: h264" in told
    assert "yuv420p(tv, bt709, progressive)" in told  # matrix, primaries and transfer
    data = path.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize(("height", "width"), [(33, 32), (32, 49), (33, 49)])
def test_odd_sizes_have_their_edge_twice(height, width, tmp_path):
    frames = np.zeros((2, height, width, 3), np.uint8)
    frames[:, :, width // 2 :] = 200
    read, _ = read_video(write_mp4(frames, tmp_path / "odd.mp4"))
    assert read.shape == (2, height + height % 2, width + width % 2, 3)
    # Against the picture whose edge is repeated: no black line, no shift.
    assert (
        np.abs(read.astype(int) - np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), "edge")).max() < 12
    )


def test_an_existing_file_is_replaced(clip, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"old")
    assert len(read_video(write_mp4(clip, tmp_path / "clip.mp4"))[0]) == len(clip)


def test_a_failing_encoder_leaves_nothing(clip, tmp_path, monkeypatch):
    """It wrote half a file, said why, and failed: neither it nor the temporary name is left; the old file still is."""
    fake = tmp_path / "ffmpeg"
    failing = 'for last; do :; done\necho half > "${last#file:}"\necho "no space left" >&2\n'
    failing += 'echo "Conversion failed!" >&2\nexit 1\n'
    fake.write_text(f"#!/bin/sh\n{failing}")
    fake.chmod(0o755)
    monkeypatch.setattr(video, "encoder", lambda: str(fake))
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(EncodingError, match=r"could not write .*clip\.mp4: no space left"):
        write_mp4(clip, folder / "clip.mp4")
    assert list(folder.iterdir()) == []
    (folder / "clip.mp4").write_bytes(b"old")
    with pytest.raises(EncodingError):
        write_mp4(clip, folder / "clip.mp4")
    assert [f.read_bytes() for f in folder.iterdir()] == [b"old"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_is_no_fault_of_the_encoder(clip, tmp_path):
    (tmp_path / "clip.mp4").symlink_to("/dev/full")
    with pytest.raises(NotWritten) as refused:
        write_mp4(clip, tmp_path / "clip.mp4")
    said = r".*clip\.mp4 could not be written: \[Errno 28\] No space left on device\. \d+ MiB are free there\."
    assert re.fullmatch(said, str(refused.value)), refused.value


def test_a_name_that_looks_like_a_protocol(clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(read_video(write_mp4(clip, "12:30.mp4").resolve())[0]) == len(clip)


def test_an_encoder_that_cannot_is_known_before_the_steps(tmp_path, monkeypatch):
    video.check_encoder.cache_clear()
    video.check_encoder()
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "none"))
    video.check_encoder.cache_clear()
    with pytest.raises(EncodingError, match="videos cannot be written here: .*Unset IMAGEIO_FFMPEG_EXE"):
        check_outputs(tmp_path / "a.mp4", None, False)
    with pytest.raises(EncodingError, match="videos cannot be written here"):
        check_outputs(None, tmp_path / "a.html", True)
    video.check_encoder.cache_clear()


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (np.zeros((2, 32, 32), np.uint8), 16, r"uint8 \[F, H, W, 3\], got uint8 \[2, 32, 32\]"),
        (np.zeros((2, 32, 32, 3), np.float32), 16, "got float32"),
        (np.zeros((0, 32, 32, 3), np.uint8), 16, r"\[0, 32, 32, 3\]"),
        (np.zeros((2, 32, 32, 3), np.uint8), 0, "fps is 0"),
        (np.zeros((2, 32, 32, 3), np.uint8), float("inf"), "fps is inf"),
    ],
)
def test_frames_that_cannot_be_written(frames, fps, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_mp4(frames, tmp_path / "clip.mp4", fps)
    assert list(tmp_path.iterdir()) == []


def test_reading_what_is_not_there(tmp_path):
    with pytest.raises(Undecodable, match=r"missing\.mp4 cannot be decoded: No such file"):
        read_video(tmp_path / "missing.mp4")


def test_contact_sheet_shows_evenly_spaced_frames():
    """Frame i is of grey 8 i; 5 of 31 frames are 0, 8, 15, 22 and 30."""
    grey = np.repeat(np.arange(31, dtype=np.uint8) * 8, 20 * 40 * 3).reshape(31, 20, 40, 3)
    sheet = contact_sheet({"up": grey, "down": grey[::-1].copy()}, columns=5, width=1000)
    assert sheet.shape[1] == 1000
    assert sheet.dtype == np.uint8

    def runs(y):
        """The greys of the pictures in a line of pixels, from left to right."""
        line = [int(v) for v in sheet[y, :, 0]]
        starts = [i for i in range(len(line) - 40) if len(set(line[i : i + 40])) == 1 and line[i] < 250]
        return [line[i] for n, i in enumerate(starts) if n == 0 or line[i] != line[starts[n - 1]]]

    rows = [runs(y) for y in range(0, sheet.shape[0], 4)]
    assert [0, 64, 120, 176, 240] in rows
    assert [240, 176, 120, 64, 0] in rows


def test_contact_sheet_with_long_names(clip):
    """Frames keep most of the width: the names of configs that differ in many settings go over several lines."""
    longest = (
        "svg2-q_clusters=64-k_clusters=256-top_p=0.85-iterations=2-init_iterations=20-compensate=True-min_share=0.05"
    )
    names = [longest, longest.replace("64", "32"), "dense", "x" * 400]
    sheet = contact_sheet({name: clip for name in names}, columns=6, width=1400)
    assert sheet.shape[1] == 1400
    coloured = (sheet.max(-1).astype(int) - sheet.min(-1)) > 30  # text is grey
    columns = np.flatnonzero(coloured.any(0))
    assert columns.min() < 500 and columns.max() < 1400 - 10
    runs = np.flatnonzero(np.diff(columns) > 1)
    assert len(runs) == 5, "six frames in a row"
    assert (sheet[:, :8] == 255).all(), "no name begins beyond the left edge"
    short = contact_sheet({"dense": clip, "svg2": clip}, columns=6, width=1400)
    assert (short[40:, :60] < 100).any()  # as before, on one line


def test_contact_sheet_of_a_short_video(clip):
    """Fewer frames than columns: each is there once, and not stretched over the page."""
    sheet = contact_sheet({"dense": clip[:1]}, columns=7, width=1000)
    assert sheet.shape[0] < 300
    with pytest.raises(ValueError, match="one shape"):
        contact_sheet({"a": clip, "b": clip[:3]})
    with pytest.raises(ValueError, match="one shape"):
        contact_sheet({})
