"""Videos as phones, editors and browsers write them: which frames they have, in which shape and colours."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from vidaccel.generation.media.files import Cut, Media, Undecodable
from vidaccel.generation.media.video_reader import _opened, read_video
from vidaccel.lora.data.decode import probe, read_clip
from vidaccel.lora.data.folder import MediaFolder
from vidaccel.lora.data.sampler import Pick
from vidaccel.lora.distributed.generators import Place
from vidaccel.lora.settings import DataSettings, SizeSettings

H264 = ("-c:v", "libx264", "-crf", "4", "-preset", "ultrafast")


def ffmpeg(*arguments: str | Path) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-y", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr


def greys(count: int, rate: str | int, step: int = 2) -> tuple[str, ...]:
    """Input of ffmpeg: frames whose grey level is `step` times their number."""
    return ("-f", "lavfi", "-i", f"color=black:s=64x32:r={rate},format=gray,geq=lum='{step}*N',trim=end_frame={count}")


def numbers(clip: torch.Tensor, step: int = 2) -> list[int]:
    """The numbers of the frames of a clip of `greys`."""
    return ((clip.mean(dim=(0, 2, 3)) + 1) * 127.5 / step).round().int().tolist()


def clip_of(path: Path, frames: int, fps: float | None = None, start: int = 0, size=(32, 64)) -> torch.Tensor:
    return read_clip(path, probe(path, "videos"), Cut(start, frames, fps, *size), "videos")


@pytest.fixture
def folder_of(tmp_path) -> Callable[..., MediaFolder]:
    """The dataset of the videos in `tmp_path`, with a caption beside each."""

    def make(frames: int, fps: float | None = None) -> MediaFolder:
        for path in list(tmp_path.iterdir()):
            path.with_suffix(".txt").write_text("x")
        sizes = (SizeSettings(frames, 32, 64),)
        return MediaFolder.open(DataSettings(kind="videos", folder=str(tmp_path), sizes=sizes, fps=fps))

    return make


# -- which frames ------------------------------------------------------------------------------------------------------


RATES = [("24", 24), ("25", 25), ("30000/1001", 29.97), ("30", 30), ("50", 50), ("60000/1001", 59.94), ("12.5", 12.5)]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "avi", "ts"])
@pytest.mark.parametrize(("rate", "shown"), RATES)
def test_a_clip_of_exactly_the_wanted_length_is_taken(tmp_path, folder_of, rate, shown, suffix):
    """Two seconds at any rate are 32 frames of 16 a second, whatever the time stamps are rounded to."""
    count = round(2 * shown)
    codec = ("-c:v", "libvpx-vp9", "-lossless", "1", "-cpu-used", "8") if suffix == "webm" else H264
    ffmpeg(*greys(count, rate), *codec, tmp_path / f"a.{suffix}")
    for fps, frames in ((16, 32), (None, count)):
        folder = folder_of(frames, fps)
        (entry,) = folder.entries
        assert entry.media.frames == count and abs(entry.media.fps - Fraction(rate)) < 0.02
        assert not entry.media.variable
        clip = folder.pixels(Pick(folder.members(folder.data.sizes)[0][0], (frames, 32, 64), Place(0, 0, 1, 0)))
        step = shown / 16 if fps else 1
        wanted = [number * step for number in range(frames)]
        assert np.abs(np.array(numbers(clip)) - wanted).max() <= 0.75


def test_one_frame_less_is_one_frame_less(tmp_path, folder_of):
    ffmpeg(*greys(31, 16), *H264, tmp_path / "a.mp4")
    assert folder_of(31, 16).members((SizeSettings(31, 32, 64),))[0]
    assert probe(tmp_path / "a.mp4", "videos").frames_at(16) == 31


def test_sound_and_the_header_do_not_count(tmp_path):
    """Sound that is longer or starts earlier, and a header without a duration, as browsers and cameras write it."""
    sound = ("-f", "lavfi", "-i", "sine=d=9")
    ffmpeg(*greys(30, 15), *sound, *H264, "-c:a", "aac", tmp_path / "longer.mp4")
    ffmpeg("-itsoffset", "1.5", *greys(30, 15), *sound, *H264, "-c:a", "aac", tmp_path / "later.mp4")
    ffmpeg("-itsoffset", "1.5", *greys(30, 15), *sound, *H264, "-c:a", "aac", tmp_path / "later.mkv")
    ffmpeg(*greys(30, 15), *H264, "-f", "matroska", "-live", "1", tmp_path / "live.mkv")
    fragments = ("-movflags", "frag_keyframe+empty_moov", "-g", "7")
    ffmpeg(*greys(30, 15), *H264, *fragments, tmp_path / "fragments.mp4")
    for path in sorted(tmp_path.iterdir()):
        media = probe(path, "videos")
        assert (media.frames, media.fps, media.seconds) == (30, 15, 2), path.name
        assert media.frames_at(5) == 10
        assert numbers(clip_of(path, 30)) == list(range(30)), path.name
        assert numbers(clip_of(path, 10, 5)) == list(range(0, 30, 3)), path.name


@pytest.mark.parametrize("codec", [H264, (*H264, "-bf", "3", "-g", "30"), ("-c:v", "mpeg4", "-q:v", "1", "-bf", "2")])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "ts"])
def test_clips_start_anywhere(tmp_path, codec, suffix):
    """Behind key frames, between them, and among frames that are stored out of order."""
    ffmpeg(*greys(60, 25, step=4), *codec, tmp_path / f"a.{suffix}")
    for start in (0, 1, 7, 29, 30, 31, 52):
        clip = clip_of(tmp_path / f"a.{suffix}", 8, start=start)
        assert numbers(clip, step=4) == list(range(start, start + 8))


def test_what_was_cut_without_encoding_starts_where_it_is_shown(tmp_path):
    """An edit list leaves out the frames between the key frame and the cut."""
    ffmpeg(*greys(60, 25), *H264, "-g", "25", tmp_path / "whole.mp4")
    ffmpeg("-ss", "0.4", "-i", tmp_path / "whole.mp4", "-c", "copy", tmp_path / "cut.mp4")
    media = probe(tmp_path / "cut.mp4", "videos")
    assert media.frames == 50
    assert numbers(clip_of(tmp_path / "cut.mp4", 50)) == list(range(10, 60))


def test_a_recording_that_begins_between_key_frames(tmp_path):
    """Its first frames cannot be decoded, since what they follow from is not there."""
    ffmpeg(*greys(60, 25, step=4), "-c:v", "libx264", "-crf", "4", "-g", "20", "-bf", "2", tmp_path / "a.ts")
    packets = (tmp_path / "a.ts").read_bytes()
    (tmp_path / "cut.ts").write_bytes(packets[188 * (len(packets) // 188 // 4) :])
    media = probe(tmp_path / "cut.ts", "videos")
    assert (media.frames, media.fps) == (40, 25)
    for start in (0, 13, 32):
        wanted = list(range(20 + start, 28 + start))
        assert numbers(clip_of(tmp_path / "cut.ts", 8, start=start), step=4) == wanted


def test_a_variable_rate_is_said_and_sampled_by_time(tmp_path, folder_of, caplog):
    """A second at 20 frames a second, a second of one frame, and half a second at 20."""
    select = "select='lt(n,20)+eq(n,20)+gte(n,40)'"
    ffmpeg(*greys(50, 20), "-vf", select, "-fps_mode", "vfr", *H264, tmp_path / "a.mkv")
    media = probe(tmp_path / "a.mkv", "videos")
    assert media.variable and media.frames == 31 and media.seconds == Fraction(5, 2) and media.frames_at(10) == 25
    folder = folder_of(25, 10)
    assert "1 videos have a variable frame rate (a.mkv); they are sampled at 10 frames per second, by the time" in (
        caplog.text
    )
    clip = folder.pixels(Pick(0, (25, 32, 64), Place(0, 0, 1, 0)))
    assert numbers(clip) == [*range(0, 20, 2), *[20] * 10, *range(40, 50, 2)]
    later = read_clip(tmp_path / "a.mkv", media, Cut(19, 4, 10, 32, 64), "videos")
    assert numbers(later) == [20, 40, 42, 44]
    folder = folder_of(31)
    assert "every frame is taken, however long it is shown: set data.fps" in caplog.text
    clip = folder.pixels(Pick(0, (31, 32, 64), Place(0, 0, 1, 0)))
    assert numbers(clip) == [*range(21), *range(40, 50)]


def test_frames_that_come_twice_are_said(tmp_path, folder_of, caplog):
    ffmpeg(*greys(16, 8), *H264, tmp_path / "a.mp4")
    folder = folder_of(32, 16)
    assert "1 videos have less than data.fps = 16 frames per second, so some of their frames come twice" in caplog.text
    assert numbers(folder.pixels(Pick(0, (32, 32, 64), Place(0, 0, 1, 0))))[:4] == [0, 1, 1, 2]


def test_interlaced_videos_are_said(tmp_path, folder_of, caplog):
    ffmpeg(*greys(16, 25), "-vf", "interlace", *H264, "-flags", "+ilme+ildct", tmp_path / "a.mp4")
    folder = folder_of(4)
    assert folder.entries[0].media.interlaced and "1 videos are interlaced and are taken as they are" in caplog.text


def test_gifs_are_videos_and_lie_on_white(tmp_path):
    ffmpeg(*greys(20, 10), tmp_path / "a.gif")
    assert probe(tmp_path / "a.gif", "videos").frames == 20
    assert numbers(clip_of(tmp_path / "a.gif", 20)) == list(range(20))
    from PIL import Image

    frames = [Image.new("RGBA", (64, 32), (0, 0, 0, 0)) for _ in range(3)]
    for number, frame in enumerate(frames):
        frame.paste((0, 0, 0, 255), (0, 0, 16 + 16 * number, 32))
    frames[0].save(tmp_path / "clear.gif", save_all=True, append_images=frames[1:], disposal=2, duration=100)
    clip = clip_of(tmp_path / "clear.gif", 3)
    assert clip[..., 60:].min() > 0.98 and clip[..., :12].max() < -0.98


def test_what_has_no_picture_stream(tmp_path):
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", "-c:a", "aac", tmp_path / "sound.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name in ("sound", "text", "empty", "none"):
        with pytest.raises(Undecodable, match=f"{name}.mp4 cannot be decoded: "):
            probe(tmp_path / f"{name}.mp4", "videos")


def test_names_and_titles_are_anything(tmp_path, monkeypatch):
    """A name that looks like a protocol of ffmpeg's, and a title that is not in UTF-8."""
    ffmpeg(*greys(4, 25), *H264, tmp_path / "a.mkv")
    title = b"metadata=title=caf\xe9".decode("utf-8", "surrogateescape")
    arguments = ("-i", tmp_path / "a.mkv", "-c", "copy", "-metadata", title.partition("=")[2], tmp_path / "b.mp4")
    ffmpeg(*arguments)
    assert b"caf\xe9" in (tmp_path / "b.mp4").read_bytes()
    (tmp_path / "b.mp4").rename(tmp_path / "take 1: dawn%03d.mp4")
    monkeypatch.chdir(tmp_path)
    assert probe(Path("take 1: dawn%03d.mp4"), "videos").frames == 4
    assert numbers(clip_of(Path("take 1: dawn%03d.mp4"), 4)) == [0, 1, 2, 3]


def test_one_frame(tmp_path):
    ffmpeg(*greys(1, 25), *H264, tmp_path / "a.mp4")
    assert probe(tmp_path / "a.mp4", "videos").frames == 1
    assert clip_of(tmp_path / "a.mp4", 1).shape == (3, 1, 32, 64)


def test_the_number_of_threads_changes_no_bit(tmp_path, monkeypatch):
    """Background processes decode with one, the main one with several."""
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=320x240:r=25:d=2,noise=alls=20", "-c:v", "libx264", tmp_path / "a.mp4")
    made = []
    for threads in (1, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        with _opened(tmp_path / "a.mp4") as (_, stream):
            assert stream.codec_context.thread_count == threads
        made.append(clip_of(tmp_path / "a.mp4", 20, start=17, size=(120, 160)))
    assert torch.equal(*made)


# -- their shape -------------------------------------------------------------------------------------------------------


def quarters(clip: torch.Tensor) -> list[str]:
    """The colours at the corners of the first frame: upper left, upper right, lower left, lower right."""
    frame = clip[:, 0]
    spots = [frame[:, y, x] for y in (4, -5) for x in (4, -5)]
    return ["".join("rgb"[i] for i in range(3) if spot[i] > 0) or "-" for spot in spots]


@pytest.fixture
def coloured(tmp_path) -> Path:
    """64x32: red, green, blue and black."""
    cells = "[0]pad=64:32[a];[a][1]overlay=32:0[b];[b][2]overlay=0:16"
    inputs = [part for c in ("red", "lime", "blue") for part in ("-f", "lavfi", "-i", f"color={c}:s=32x16:r=10:d=0.5")]
    ffmpeg(*inputs, "-filter_complex", cells, *H264, "-pix_fmt", "yuv444p", tmp_path / "upright.mp4")
    return tmp_path / "upright.mp4"


# Quarter turns are counter-clockwise, and mirroring comes after the turn.
SHOWN = {
    ("0",): ["r", "g", "b", "-"],
    ("90",): ["g", "-", "r", "b"],
    ("180",): ["-", "b", "g", "r"],
    ("-90",): ["b", "r", "-", "g"],
    ("0", "-display_hflip"): ["g", "r", "-", "b"],
    ("0", "-display_vflip"): ["b", "-", "r", "g"],
    ("90", "-display_hflip"): None,
    ("-90", "-display_hflip"): None,
}


@pytest.mark.parametrize("turn", SHOWN)
def test_videos_are_turned_as_their_file_says(tmp_path, coloured, turn):
    ffmpeg("-display_rotation", turn[0], *turn[1:], "-i", coloured, "-c", "copy", tmp_path / "turned.mp4")
    media = probe(tmp_path / "turned.mp4", "videos")
    assert (media.height, media.width) == ((64, 32) if "90" in turn[0] else (32, 64))
    found = quarters(clip_of(tmp_path / "turned.mp4", 4, size=(media.height, media.width)))
    ffmpeg("-i", tmp_path / "turned.mp4", *H264, "-pix_fmt", "yuv444p", tmp_path / "player.mp4")  # it turns by itself
    assert found == quarters(clip_of(tmp_path / "player.mp4", 4, size=(media.height, media.width)))
    assert SHOWN[turn] is None or found == SHOWN[turn]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_videos_of_cameras_with_exif_are_turned_as_it_says(tmp_path, coloured, orientation):
    """Motion-JPEG: FFmpeg 8 hands EXIF on with each frame, a kind of side data that PyAV has no name for."""
    picture = Image.fromarray(read_video(coloured)[0][0])
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    ffmpeg("-framerate", 10, "-loop", 1, "-t", 0.4, "-i", tmp_path / "a.jpg", "-c", "copy", tmp_path / "a.mov")
    shown = np.array(ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")))
    read, fps = read_video(tmp_path / "a.mov")
    assert fps == 10 and read.shape == (4, *shown.shape)
    assert np.abs(read[0].astype(int) - shown).mean() < 8


def test_other_angles_are_refused(tmp_path, coloured):
    ffmpeg("-display_rotation", "30", "-i", coloured, "-c", "copy", tmp_path / "turned.mp4")
    with pytest.raises(Undecodable, match="turned.mp4 cannot be decoded: it is to be shown turned by"):
        probe(tmp_path / "turned.mp4", "videos")


@pytest.mark.parametrize(("ratio", "width"), [("2", 128), ("1/2", 32), ("64/45", 91)])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_pixels_that_are_not_square(tmp_path, coloured, ratio, width, suffix):
    """What is stored as 64x32 is shown wider or narrower; a circle stays one."""
    path = tmp_path / f"wide.{suffix}"
    ffmpeg("-i", coloured, "-vf", f"setsar={ratio}", *H264, "-pix_fmt", "yuv444p", path)
    media = probe(path, "videos")
    assert (media.height, media.width) == (32, width)
    whole = clip_of(path, 4, size=(32, width))
    assert quarters(whole) == ["r", "g", "b", "-"]
    middle = clip_of(path, 4, size=(32, 32))  # cut from the middle of what is shown
    assert torch.equal(middle, whole[..., (width - 32) // 2 :][..., :32]) or width % 2


def test_turned_and_not_square(tmp_path, coloured):
    ffmpeg("-i", coloured, "-vf", "setsar=2", *H264, "-pix_fmt", "yuv444p", tmp_path / "wide.mp4")
    ffmpeg("-display_rotation", "-90", "-i", tmp_path / "wide.mp4", "-c", "copy", tmp_path / "tall.mp4")
    media = probe(tmp_path / "tall.mp4", "videos")
    assert (media.height, media.width) == (128, 32)
    assert quarters(clip_of(tmp_path / "tall.mp4", 4, size=(128, 32))) == ["b", "r", "-", "g"]


# -- their colours -----------------------------------------------------------------------------------------------------


COLOURS = [(200, 40, 30), (30, 180, 60), (20, 60, 210), (250, 250, 250), (128, 100, 80), (5, 5, 5)]


def patches(path: Path, *options: str) -> None:
    """A video of patches in `COLOURS`, written as said."""
    picture = np.concatenate([np.full((32, 32, 3), colour, np.uint8) for colour in COLOURS], axis=1)
    raw = path.with_suffix(".raw")
    raw.write_bytes(picture.tobytes() * 3)
    shape = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "192x32", "-r", "10")
    ffmpeg(*shape, "-i", raw, *options, "-c:v", "libx264", "-qp", "1", path)
    raw.unlink()


def colours(path: Path, size=(32, 192)) -> np.ndarray:
    clip = clip_of(path, 3, size=size)
    return ((clip[:, 1, 16, 16::32].T + 1) * 127.5).round().int().numpy()


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv444p", "yuv422p10le"])
@pytest.mark.parametrize("levels", ["tv", "pc"])
@pytest.mark.parametrize(
    ("matrix", "name"), [("bt601", "smpte170m"), ("bt601", "bt470bg"), ("bt709", "bt709"), ("bt2020", "bt2020nc")]
)
def test_colours_are_those_that_the_stream_names(tmp_path, matrix, name, levels, pixels):
    convert = f"scale=out_color_matrix={matrix}:out_range={levels},format={pixels},setparams=colorspace={name}"
    patches(tmp_path / "a.mp4", "-vf", f"{convert}:range={levels}", "-colorspace", name, "-color_range", levels)
    assert np.abs(colours(tmp_path / "a.mp4") - COLOURS).max() <= 3


def test_colours_that_are_not_named_are_those_that_players_assume(tmp_path):
    """The matrix of old television for small pictures, that of HD for large ones."""
    patches(tmp_path / "small.mp4", "-vf", "scale=out_color_matrix=bt601,format=yuv444p,setparams=colorspace=unknown")
    assert np.abs(colours(tmp_path / "small.mp4") - COLOURS).max() <= 3
    large = "scale=1344:224:flags=neighbor:out_color_matrix=bt709,format=yuv444p,setparams=colorspace=unknown"
    patches(tmp_path / "large.mp4", "-vf", large)
    assert np.abs(colours(tmp_path / "large.mp4") - COLOURS).max() <= 3


@pytest.mark.parametrize("pixels", ["yuvj420p", "yuvj444p"])
def test_motion_jpeg_counts_from_0_to_255(tmp_path, pixels):
    patches(tmp_path / "a.avi", "-pix_fmt", pixels, "-c:v", "mjpeg", "-q:v", "1", "-f", "avi", tmp_path / "b.avi")
    assert np.abs(colours(tmp_path / "b.avi") - COLOURS).max() <= 4


def test_rgb_stays_rgb(tmp_path):
    patches(tmp_path / "a.mkv", "-c:v", "ffv1", "-pix_fmt", "gbrp")
    ffmpeg("-i", tmp_path / "a.mkv", "-c:v", "ffv1", "-pix_fmt", "gbrp", tmp_path / "b.mkv")
    assert np.array_equal(colours(tmp_path / "b.mkv"), colours(tmp_path / "a.mkv"))
    assert np.abs(colours(tmp_path / "b.mkv") - COLOURS).max() <= 2


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
def test_hdr_is_said_and_mapped(tmp_path, folder_of, transfer, caplog):
    """A red as phones film it: without mapping it would come out grey."""
    start = "format=gbrp,setparams=color_primaries=bt709:color_trc=bt709:colorspace=gbr:range=pc"
    convert = f"zscale=p=bt2020:t={transfer}:m=bt2020nc:r=tv,format=yuv420p10le"
    filters = f"{start},zscale=t=linear:npl=203,format=gbrpf32le,{convert}"
    ffmpeg("-f", "lavfi", "-i", "color=0xC83C3C:s=64x32:r=10:d=0.4", "-vf", filters, *H264, tmp_path / "a.mp4")
    folder = folder_of(4)
    assert folder.entries[0].media.hdr and "1 videos are HDR and are taken in the range of others" in caplog.text
    clip = folder.pixels(Pick(0, (4, 32, 64), Place(0, 0, 1, 0)))
    red, green, blue = ((clip[:, 1, 16, 32] + 1) * 127.5).tolist()
    assert red > 2.2 * green and red > 2.2 * blue


# -- what is remembered ------------------------------------------------------------------------------------------------


def test_media_survive_json():
    import json
    from dataclasses import asdict

    media = Media(32, 64, 31, Fraction(30000, 1001), Fraction(5, 2), 129600, True)
    assert Media(**json.loads(json.dumps(asdict(media), default=str))) == media
