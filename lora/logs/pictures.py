"""Pictures and videos that validation leaves."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from ...generation.media.video import write_mp4

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def written_to(folder: Path, what: str = "validation") -> Iterator[None]:
    """A block that writes files into a folder, made for it. Where that fails, say so and go on: training is worth more.

    `what` is written. Only writing belongs into the block: other errors would be taken for one of writing.
    """
    with contextlib.suppress(OSError):  # then nothing can be written to it either, which is said below
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except OSError as error:
        logger.error("%s could not be written to %s: %s. The run goes on.", what, folder, error)


def strips(videos: Sequence[torch.Tensor], columns: int = 6) -> np.ndarray:
    """A picture `[h, w, 3]` of bytes: one row a video `[3, T, H, W]` in [-1, 1], evenly spaced frames side by side."""
    rows = []
    for video in videos:
        count = min(columns, video.shape[1])
        picks = torch.linspace(0, video.shape[1] - 1, count).round().long()
        rows.append(torch.cat(list(video[:, picks].transpose(0, 1)), dim=2))
    return pixels_of(torch.cat(rows, dim=1).permute(1, 2, 0))


def write_picture(picture: np.ndarray, path: Path) -> None:
    """Write a picture as PNG."""
    from PIL import Image

    Image.fromarray(picture).save(path)


def write_video(video: torch.Tensor, path: Path, fps: float = 16) -> None:
    """Write a video `[3, T, H, W]` in [-1, 1] as H.264."""
    write_mp4(pixels_of(video.permute(1, 2, 3, 0)), path, fps)


def pixels_of(pixels: torch.Tensor) -> np.ndarray:
    """Numbers in [-1, 1] as bytes, in the same shape."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
