"""Decoding: what a video or image file holds, and clips of the wanted size from it."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

_ORIENTATION = 274
"""The EXIF tag of how a picture is turned."""


class Undecodable(OSError):
    """A file that is no video or image, or a damaged one; the message names it."""


@dataclass(frozen=True)
class Media:
    """What a file holds.

    Args:
        height, width: pixels, as shown.
        frames: about how many, 1 for an image.
        fps: frames per second, 1 for an image.
    """

    height: int
    width: int
    frames: int = 1
    fps: float = 1.0


@dataclass(frozen=True)
class Cut:
    """The part of a file that becomes a clip.

    Args:
        start: first frame, counted at `fps`.
        frames: how many.
        fps: frames per second of the clip; None for those of the file.
        height, width: pixels of the clip.
        enlarge: the picture is scaled to cover the clip, and then by this, 1 or more.
        top, left: where the clip lies in what sticks out, from 0 (upper or left edge) to 1.
    """

    start: int
    frames: int
    fps: float | None
    height: int
    width: int
    enlarge: float = 1.0
    top: float = 0.5
    left: float = 0.5

    def scaled(self, media: Media) -> tuple[int, int]:
        """Height and width of the whole picture, scaled."""
        factor = max(self.height / media.height, self.width / media.width) * self.enlarge
        return max(self.height, round(media.height * factor)), max(self.width, round(media.width * factor))

    def corner(self, scaled: tuple[int, int]) -> tuple[int, int]:
        """Top and left of the clip in the scaled picture."""
        return round((scaled[0] - self.height) * self.top), round((scaled[1] - self.width) * self.left)


def probe(path: Path) -> Media:
    """What a file holds, from its header.

    Raises:
        Undecodable: no video or image.
    """
    if path.suffix.lower() in IMAGE_SUFFIXES:
        with _opened(path) as image:
            image.verify()
        with _opened(path) as image:  # nothing can be asked of one that was verified
            turned = image.getexif().get(_ORIENTATION, 1) >= 5  # by a quarter, whichever way
            return Media(image.width, image.height) if turned else Media(image.height, image.width)
    reader = None
    try:
        import imageio_ffmpeg

        reader = imageio_ffmpeg.read_frames(str(path))
        meta = next(reader)
        next(reader)  # the first frame: a header alone proves nothing
    except (OSError, RuntimeError, StopIteration, KeyError, ValueError) as error:
        raise Undecodable(f"{path} cannot be decoded: {_reason(error)}") from error
    finally:
        if reader is not None:
            reader.close()
    width, height = meta["size"]
    fps = float(meta["fps"]) or 1.0
    return Media(height, width, max(1, round(float(meta["duration"]) * fps)), fps)


def read_clip(path: Path, media: Media, cut: Cut, decoder: str = "imageio") -> torch.Tensor:
    """A clip `[3, T, H, W]` in [-1, 1].

    Raises:
        Undecodable: a damaged file, or one with fewer frames than its header says.
    """
    if path.suffix.lower() in IMAGE_SUFFIXES:
        frames = _image(path, media, cut)
    elif decoder == "torchcodec":
        frames = _torchcodec(path, media, cut)
    else:
        frames = _ffmpeg(path, media, cut)
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1


def check_decoder(decoder: str) -> str | None:
    """Why a decoder cannot be used, or None."""
    if decoder == "torchcodec" and importlib.util.find_spec("torchcodec") is None:
        return "data.decoder is torchcodec, which is not installed: pip install torchcodec, or use imageio."
    return None


def _ffmpeg(path: Path, media: Media, cut: Cut) -> np.ndarray:
    import imageio_ffmpeg

    fps = cut.fps or media.fps
    height, width = cut.scaled(media)
    top, left = cut.corner((height, width))
    filters = [f"fps={fps:g}"] if cut.fps else []
    filters += [f"scale={width}:{height}:flags=bicubic", f"crop={cut.width}:{cut.height}:{left}:{top}"]
    # Seeking half a frame early is what gets exactly the frame that starts there.
    seek = ["-ss", f"{max(0.0, (cut.start - 0.5) / fps):.6f}"] if cut.start else []
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", *seek, "-i", str(path)]
    command += ["-vf", ",".join(filters), "-frames:v", str(cut.frames), "-fps_mode", "passthrough"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    frame = cut.height * cut.width * 3
    count = len(done.stdout) // frame
    if done.returncode and not count:
        raise Undecodable(f"{path} cannot be decoded: {_reason(done.stderr.decode(errors='replace'))}")
    frames = np.frombuffer(done.stdout[: count * frame], np.uint8).reshape(count, cut.height, cut.width, 3)
    return _enough(frames, path, cut)


def _torchcodec(path: Path, media: Media, cut: Cut) -> np.ndarray:
    from torch.nn import functional
    from torchcodec.decoders import VideoDecoder

    step = media.fps / (cut.fps or media.fps)
    indices = [round((cut.start + i) * step) for i in range(cut.frames)]
    try:
        frames = VideoDecoder(str(path)).get_frames_at(indices).data
    except (RuntimeError, ValueError, IndexError) as error:
        raise Undecodable(f"{path} cannot be decoded: {_reason(error)}") from error
    scaled = cut.scaled(media)
    top, left = cut.corner(scaled)
    frames = functional.interpolate(frames.float(), scaled, mode="bicubic", antialias=True).clamp(0, 255).round().byte()
    frames = frames[..., top : top + cut.height, left : left + cut.width]
    return _enough(frames.permute(0, 2, 3, 1).numpy(), path, cut)


def _image(path: Path, media: Media, cut: Cut) -> np.ndarray:
    from PIL import Image, ImageOps

    scaled = cut.scaled(media)
    top, left = cut.corner(scaled)
    with _opened(path) as image:
        upright = ImageOps.exif_transpose(image)
        picture = upright.convert("RGB").resize((scaled[1], scaled[0]), Image.Resampling.BICUBIC)
    return np.asarray(picture.crop((left, top, left + cut.width, top + cut.height)))[None].copy()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A PIL image; what goes wrong in the block is `Undecodable`."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Undecodable(f"{path} cannot be decoded: {error}") from error


def _enough(frames: np.ndarray, path: Path, cut: Cut) -> np.ndarray:
    if len(frames) < cut.frames:
        raise Undecodable(f"{path} cannot be decoded: it ends after {len(frames)} of the {cut.frames} frames of a clip")
    return frames[: cut.frames].copy()


def _reason(error: Exception | str) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no reason given"
