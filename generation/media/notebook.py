"""Videos below the cell of a notebook whose value they are."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from .sound import Sound
from .video import mp4_url

CRF = 26
"""Quality of what is shown (`video.CRF` is that of files): the notebook keeps it, in a fraction of the bytes."""


class Shown(NamedTuple):
    """A video, `[F, H, W, 3]` uint8 with its frames per second and its sound, and what stands below it."""

    frames: np.ndarray
    fps: float
    sound: Sound | None
    caption: str


def in_html(videos: Iterable[Shown]) -> str | None:
    """Videos side by side, small, and in the text itself; None where they cannot be encoded."""
    try:
        figures = "".join(map(_figure, videos))
    except (OSError, RuntimeError):  # `EncodingError`, or imageio-ffmpeg's, which found no encoder
        return None
    return f'<div style="display: flex; flex-wrap: wrap; gap: 1em">{figures}</div>'


def _figure(video: Shown) -> str:
    width = min(max(video.frames.shape[2], 240), 480)
    source = mp4_url(video.frames, video.fps, video.sound, CRF)
    player = f'<video src="{source}" width="{width}" controls loop></video>'
    caption = f"<figcaption>{html.escape(video.caption)}</figcaption>"
    return f'<figure style="margin: 0; max-width: {width}px">{player}{caption}</figure>'
