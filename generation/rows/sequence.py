"""The sequence in self-attention that a pipeline makes of a video: the grid of its tokens, and what lies beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...attention.layout import VideoLayout


@dataclass(frozen=True)
class Shape:
    """A video and what is made of it.

    Args:
        frames, height, width: of the video, in pixels.
        frame_factor, size_factor: of the autoencoder.
        patch: `(frames, height, width)`, in latent pixels.
        given: fields of the request that are given: image, last_image, video.
        transformer: its config.
        text: the most tokens that the pipeline lets a prompt have.
    """

    frames: int
    height: int
    width: int
    frame_factor: int
    size_factor: int
    patch: tuple[int, int, int]
    given: frozenset[str] = frozenset()
    transformer: Mapping[str, Any] = field(default_factory=dict, hash=False)
    text: int = 0

    @property
    def latent_frames(self) -> int:
        """Of a causal autoencoder, whose first latent frame is one frame."""
        return (self.frames - 1) // self.frame_factor + 1

    def history(self, *parts: tuple[int, int, int]) -> int:
        """Tokens of latent frames that went before, cut into patches of growing size.

        Args:
            parts: latent frames, and the patch that they are cut into: its frames, its side.
        """
        high, wide = self.height // self.size_factor, self.width // self.size_factor
        return sum(-(-count // long) * -(-high // side) * -(-wide // side) for count, long, side in parts)


def grid(
    shape: Shape, latent_frames: int | None = None, *, before: int = 0, after: int = 0, beside: str = "text"
) -> VideoLayout:
    """The tokens of `latent_frames`, filled up to whole patches, with others before and after them, which are called
    what `beside` says."""
    from ...attention.layout import VideoLayout

    latent = shape.latent_frames if latent_frames is None else latent_frames
    high, wide = (shape.size_factor * side for side in shape.patch[1:])
    return VideoLayout(-(-latent // shape.patch[0]), shape.height // high, shape.width // wide, before, after, beside)


def video_alone(shape: Shape) -> VideoLayout:
    """Text enters through cross-attention."""
    return grid(shape)


def text_before(shape: Shape) -> VideoLayout:
    """Text padded to its full length, then the video."""
    return grid(shape, before=shape.text)


def text_after(shape: Shape) -> VideoLayout:
    """The video, then the text."""
    return grid(shape, after=shape.text)
