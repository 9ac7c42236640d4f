"""Video files written: H.264 in MP4 that browsers play, whole or not at all; and contact sheets."""

from __future__ import annotations

import base64
import contextlib
import functools
import math
import os
import subprocess
import tempfile
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np

from ...pipelines.files.whole_files import FULL, NotWritten, staged, writing
from ..report.wrapping import wrapped
from .sound import Sound

CRF = 16
"""Quality of H.264: 0 is lossless, 23 is x264's default; 16 is hard to tell from the source."""


_MOST_LABEL = 0.3
"""Share of a contact sheet's width that the names have at the most."""
_LABEL_LINE = 26
"""Pixels from line to line of a name."""


class EncodingError(RuntimeError):
    """ffmpeg could not encode a video."""


def write_mp4(
    frames: np.ndarray, path: str | Path, fps: float = 16, sound: Sound | None = None, crf: int = CRF
) -> Path:
    """Encode a video as H.264 with 4:2:0 colour, the one kind every browser plays.

    4:2:0 needs even sizes: of an odd one, the last row or column is written twice. The file says that its colours are
    BT.709, which players assume of large videos and not of small ones.

    Args:
        frames: `[F, H, W, 3]` uint8, RGB.
        path: where to, ending in ".mp4"; an existing file is replaced.
        fps: frames per second.
        sound: written beside it as AAC, as far as the video goes.
        crf: quality, see `CRF`.

    Raises:
        ValueError: frames of another shape or dtype, or `fps` not above 0.
        EncodingError: the encoder failed; nothing is left behind.
        NotWritten: the disk is full; or the sound cannot be written to the folder of temporary files.
    """
    frames = _checked(frames)
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        _, height, width, _ = frames.shape
    frames = np.ascontiguousarray(frames)
    if not 0 < fps < math.inf:
        raise ValueError(f"fps is {fps}: it must be above 0.")
    rate = Fraction(fps).limit_denominator(1_000_000)  # 29.97... is 30000/1001 exactly
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(staged(path))
        heard: list[str] = []
        if sound is not None:
            samples = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "sound.wav"
            with writing(samples):
                sound.write_wav(samples, len(frames) / fps)
            heard = ["-i", str(samples), "-c:a", "aac"]
        # fmt: off
        command = [
            encoder(), "-hide_banner", "-loglevel", "error", "-y",
            "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(rate), "-i", "-", *heard,
            # ffmpeg converts RGB with BT.601 unless told. What a file says of its colours comes from the frames.
            "-vf", "scale=out_color_matrix=bt709:out_range=tv,"
            "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv",
            "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", str(crf), "-movflags", "+faststart",
            "-f", "mp4", f"file:{temporary}",  # a name may look like a protocol of ffmpeg's
        ]
        # fmt: on
        # A session of its own: Ctrl-C in a terminal must reach this process, which then ends the encoder, not both.
        done = subprocess.run(command, input=frames.data.cast("B"), capture_output=True, start_new_session=True)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()
            for number in FULL:
                if os.strerror(number) in said:
                    raise NotWritten(Path(path), OSError(number, os.strerror(number)))
            lines = said.splitlines()  # the first says what was wrong, the others what followed from it
            raise EncodingError(f"ffmpeg could not write {path}: {lines[0] if lines else f'exit {done.returncode}'}")
    return Path(path)


def mp4_url(frames: np.ndarray, fps: float = 16, sound: Sound | None = None, crf: int = CRF) -> str:
    """A video as the address of itself, for a page that loads nothing; see `write_mp4`."""
    with tempfile.TemporaryDirectory() as folder:
        return data_url(write_mp4(frames, Path(folder) / "video.mp4", fps, sound, crf).read_bytes(), "video/mp4")


def data_url(data: bytes, kind: str) -> str:
    """A file as the address of itself, for a page that loads nothing."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@functools.cache
def check_encoder() -> None:
    """Encode a frame, so that what the encoder lacks is known before the steps.

    Raises:
        EncodingError: it cannot be started, or cannot write H.264.
        NotWritten: the disk of temporary files is full.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            write_mp4(np.zeros((1, 16, 16, 3), np.uint8), Path(folder) / "frame.mp4")
        except NotWritten:  # no fault of the encoder
            raise
        except (EncodingError, OSError, RuntimeError) as error:
            raise EncodingError(
                f"videos cannot be written here: {error}. Unset IMAGEIO_FFMPEG_EXE, or let it name an ffmpeg that has "
                "libx264."
            ) from error


def encoder() -> str:
    """The ffmpeg that imageio-ffmpeg brings, or the one that IMAGEIO_FFMPEG_EXE names."""
    import imageio_ffmpeg

    return imageio_ffmpeg.get_ffmpeg_exe()


def contact_sheet(videos: Mapping[str, np.ndarray], columns: int = 7, width: int = 1400) -> np.ndarray:
    """A labelled picture: one row per video, one column per evenly spaced frame.

    Args:
        videos: name -> `[F, H, W, 3]` uint8; the same `F`, `H` and `W` in all.
        columns: frames per row, the first and the last among them; fewer when the video has fewer.
        width: width of the picture in pixels.

    Returns:
        `[h, width, 3]` uint8.

    Raises:
        ValueError: no video, or videos of different shapes.
    """
    from PIL import Image, ImageDraw, ImageFont

    shapes = {np.shape(frames) for frames in videos.values()}
    if len(shapes) != 1:
        raise ValueError(f"a contact sheet needs videos of one shape, got {sorted(shapes)}.")
    count, height, frame_width, _ = shapes.pop()
    chosen = np.unique(np.linspace(0, count - 1, min(columns, count)).round().astype(int))

    label_font, frame_font = ImageFont.load_default(size=20), ImageFont.load_default(size=16)
    labels = {name: wrapped(name, label_font.getlength, width * _MOST_LABEL) for name in videos}
    longest = max(label_font.getlength(line) for label in labels.values() for line in label.split("\n"))
    margin, gap, header = 16, 6, 30
    left = int(margin + longest + 14)
    cell_width = (width - left - margin - gap * (len(chosen) - 1)) // len(chosen)
    # A short video must not fill the page with two huge frames.
    cell_width = max(16, min(cell_width, width // 5))
    cell_height = max(8, round(cell_width * height / frame_width))
    breaks = max(label.count("\n") for label in labels.values())
    row_height = max(cell_height, _LABEL_LINE * (breaks + 1) if breaks else 0)
    total = margin + header + len(videos) * (row_height + gap) - gap + margin

    sheet = Image.new("RGB", (width, total), "white")
    draw = ImageDraw.Draw(sheet)
    for column, frame in enumerate(chosen):
        x = left + column * (cell_width + gap) + cell_width / 2
        draw.text((x, margin + header / 2 - 4), f"frame {frame}", fill="#666666", font=frame_font, anchor="mm")
    for row, (name, frames) in enumerate(videos.items()):
        y = margin + header + row * (row_height + gap)
        place = (left - 14, y + cell_height / 2 + (row_height - cell_height) / 2)
        draw.text(place, labels[name], fill="#222222", font=label_font, anchor="rm", align="right")
        for column, frame in enumerate(chosen):
            picture = Image.fromarray(frames[frame]).resize((cell_width, cell_height), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left + column * (cell_width + gap), y + (row_height - cell_height) // 2))
    return np.asarray(sheet)


def png(image: np.ndarray) -> bytes:
    """A picture `[H, W, 3]` uint8 as PNG; a tenth more bytes than at most effort, in a tenth of its second or two."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _checked(frames: np.ndarray) -> np.ndarray:
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(f"frames must be uint8 [F, H, W, 3], got {frames.dtype} {list(frames.shape)}.")
    return frames
