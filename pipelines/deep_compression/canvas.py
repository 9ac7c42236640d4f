"""The size that a model can make, around the size that was asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any

# diffusers' Wan pipelines refuse other heights and widths.
_PIXELS = 16


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Canvas:
    """Pixels and frames that are generated, and the part of them that was asked for.

    Args:
        frames, height, width: what is generated.
        asked_frames, asked_height, asked_width: what was asked for.
        latent_frames: of the generated video.
        temporal: pixel frames a latent frame.
    """

    frames: int
    height: int
    width: int
    asked_frames: int
    asked_height: int
    asked_width: int
    latent_frames: int
    temporal: int

    @classmethod
    def for_video(
        cls,
        frames: int,
        height: int,
        width: int,
        *,
        patch: tuple[int, int, int],
        spatial: int,
        temporal: int,
        pad_frames: int = 0,
    ) -> Canvas:
        """The smallest canvas for a video.

        Args:
            frames, height, width: what is asked for.
            patch: tokens of the transformer, in latent frames, rows and columns.
            spatial, temporal: compression of the autoencoder.
            pad_frames: frames that the autoencoder puts before a video.

        Raises:
            ValueError: a size that is no whole number, or under 1.
        """
        for name, value in (("num_frames", frames), ("height", height), ("width", width)):
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}: it must be at least 1 and whole.")
        latent_frames = _up(frames + pad_frames, temporal * patch[0]) // temporal
        return cls(
            latent_frames * temporal - pad_frames,
            _up(height, math.lcm(spatial * patch[1], _PIXELS)),
            _up(width, math.lcm(spatial * patch[2], _PIXELS)),
            frames,
            height,
            width,
            latent_frames,
            temporal,
        )

    @property
    def causal_frames(self) -> int:
        """The frame count for which diffusers' Wan pipelines, which count 4k + 1, make as many latent frames."""
        return (self.latent_frames - 1) * self.temporal + 1

    def tokens(self, patch: tuple[int, int, int], spatial: int) -> tuple[int, int, int]:
        """The grid of tokens: frames, rows, columns."""
        return self.latent_frames // patch[0], self.height // (spatial * patch[1]), self.width // (spatial * patch[2])

    @property
    def is_larger_in_space(self) -> bool:
        return (self.height, self.width) != (self.asked_height, self.asked_width)

    @property
    def is_larger(self) -> bool:
        """Whether anything is cropped."""
        return self.is_larger_in_space or self.frames != self.asked_frames

    @property
    def margins(self) -> tuple[int, int, int, int]:
        """Pixels beyond the video: left, right, top, bottom."""
        left, top = (self.width - self.asked_width) // 2, (self.height - self.asked_height) // 2
        return left, self.width - self.asked_width - left, top, self.height - self.asked_height - top

    def crop(self, video: Any) -> Any:
        """The part that was asked for.

        Args:
            video: as diffusers' video processor gives it: arrays `[B, F, H, W, C]`, tensors `[B, F, C, H, W]`, or lists
                of lists of pictures.
        """
        left, _, top, _ = self.margins
        right, bottom = left + self.asked_width, top + self.asked_height
        if isinstance(video, list):
            return [[frame.crop((left, top, right, bottom)) for frame in one[: self.asked_frames]] for one in video]
        channels_last = not hasattr(video, "is_contiguous")
        if channels_last:
            return video[:, : self.asked_frames, top:bottom, left:right]
        return video[:, : self.asked_frames, :, top:bottom, left:right]

    def __str__(self) -> str:
        return (
            f"{self.asked_frames} frames of {self.asked_width}x{self.asked_height} were asked for; {self.frames} of "
            f"{self.width}x{self.height} are made, the next size that the model can do, and cropped."
        )
