"""Decoding: what a video or image file holds, and clips of the wanted size from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ...generation.media.files import Cut, Media, Undecodable
from ...generation.media.pictures import PictureError, picture_size, read_picture
from ...generation.media.video_reader import probe_video, read_frames

VIDEO_SUFFIXES = (
    *(".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif"),
    *(".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv", ".ogv", ".3gp"),
)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")

DECODER_VERSION = 4
"""Of the pixels that a file gives, as caches name them; another one where they change."""


def suffixes_of(kind: str) -> tuple[str, ...]:
    """Those of the files of a `DataSettings.kind`."""
    return {"videos": VIDEO_SUFFIXES, "images": IMAGE_SUFFIXES, "mixed": (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES)}[kind]


def kind_of(path: Path, kind: str) -> str:
    """How a file of a `DataSettings.kind` is read: "videos" or "images". A GIF among mixed ones is a video."""
    if kind != "mixed":
        return kind
    return "videos" if path.suffix.lower() in VIDEO_SUFFIXES else "images"


def probe(path: Path, kind: str) -> Media:
    """What a file holds.

    Args:
        path: of the file.
        kind: "videos" or "images": a GIF can be either.

    Raises:
        Undecodable: no video or image.
    """
    if kind == "videos":
        return probe_video(path)
    try:
        return Media(*picture_size(path))
    except PictureError as error:
        raise Undecodable(str(error).removesuffix(".")) from error


def read_clip(path: Path, media: Media, cut: Cut, kind: str) -> torch.Tensor:
    """A clip `[3, T, H, W]` in [-1, 1]; the same bits whichever process asks.

    Raises:
        Undecodable: a damaged file, or one with fewer frames than the clip has.
    """
    frames = read_frames(path, media, cut) if kind == "videos" else _image(path, media, cut)
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1


def _image(path: Path, media: Media, cut: Cut) -> np.ndarray:
    from PIL import Image

    height, width = cut.scaled(media)
    top, left = cut.corner((height, width))
    try:
        picture = read_picture(path).resize((width, height), Image.Resampling.BICUBIC)
    except PictureError as error:
        raise Undecodable(str(error).removesuffix(".")) from error
    return np.asarray(picture.crop((left, top, left + cut.width, top + cut.height)))[None].copy()
