"""What a video or image file holds, and which part of it becomes a clip."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from .pictures import covering


class Undecodable(OSError):
    """A file that is no video or image, or a damaged one; the message names it, and is the beginning of a sentence."""


@dataclass(frozen=True)
class Media:
    """What a file holds. Of a video that is its picture stream: sound and the file's own header do not count.

    Args:
        height, width: pixels as shown: turned as the file says, and with square pixels.
        frames: how many, 1 for an image.
        fps: frames per second; of a variable rate, the mean.
        seconds: how long the frames are shown, the last one included.
        first: time stamp of the first frame, in units of the stream; None where the frames have none.
        variable: whether the frames are not evenly spaced.
        hdr: whether it is in high dynamic range (PQ or HLG).
        interlaced: whether each frame is two half pictures, of two moments.
    """

    height: int
    width: int
    frames: int = 1
    fps: Fraction = Fraction(1)
    seconds: Fraction = Fraction(1)
    first: int | None = None
    variable: bool = False
    hdr: bool = False
    interlaced: bool = False

    def __post_init__(self) -> None:
        for name in ("fps", "seconds"):  # as JSON has them, they are text
            object.__setattr__(self, name, Fraction(getattr(self, name)))

    def frames_at(self, fps: float | None) -> int:
        """How many frames there are when it is sampled at `fps`; None takes every frame."""
        if fps is None or self.frames == 1:
            return self.frames
        # Less than a thousandth of a frame too long is a rounded time stamp.
        return max(1, math.ceil(self.seconds * Fraction(fps) - Fraction(1, 1000)))


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
        width, height = covering(media.width, media.height, self.width, self.height, self.enlarge)
        return height, width

    def corner(self, scaled: tuple[int, int]) -> tuple[int, int]:
        """Top and left of the clip in the scaled picture."""
        return round((scaled[0] - self.height) * self.top), round((scaled[1] - self.width) * self.left)
