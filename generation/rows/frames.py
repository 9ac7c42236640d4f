"""How many frames a pipeline makes: its own arithmetic, so that nothing is rounded without being said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Count = Callable[[int, int], int]
"""(frames, frames of a latent frame) -> frames."""
_FARTHEST = 400
"""Steps in the search for a number that a pipeline makes; the widest gap between two is far below it."""


def nearest(value: int, makes: Callable[[int], bool]) -> tuple[int | None, int | None]:
    """The largest number up to `value` and the smallest above it that `makes` allows; None where there is none near."""
    below = next((n for n in range(value, max(0, value - _FARTHEST), -1) if makes(n)), None)
    above = next((n for n in range(value + 1, value + _FARTHEST) if makes(n)), None)
    return below, above


@dataclass(frozen=True)
class FrameRule:
    """The numbers of frames that a pipeline makes.

    Args:
        words: which, such as "4k+1"; "{k}" stands for the frames of a latent frame.
        made: frames asked of the pipeline -> frames that it makes, by its own arithmetic.
        asked: frames wanted -> what has to be asked of the pipeline to get them.
        allowed: of those that it makes, the ones that come out as they should.
    """

    words: str
    made: Count
    asked: Count = lambda frames, factor: frames
    allowed: Callable[[int, int], bool] = lambda frames, factor: True

    def makes(self, frames: int, factor: int) -> bool:
        """Whether a video of exactly `frames` can come out."""
        if frames < 1 or not self.allowed(frames, factor):
            return False
        return self.made(self.asked(frames, factor), factor) == frames

    def nearest(self, frames: int, factor: int) -> tuple[int | None, int | None]:
        """The next number that can be made, downwards (`frames` itself if it can) and upwards."""
        return nearest(frames, lambda n: self.makes(n, factor))

    def default(self, frames: int, factor: int) -> int:
        """What comes out where a pipeline asks itself for `frames`."""
        below, above = self.nearest(self.made(frames, factor), factor)
        return below or above or frames

    def told(self, factor: int) -> str:
        """`words` for an autoencoder."""
        return self.words.format(k=factor)


def _rounded(frames: int, factor: int) -> int:
    """Wan's and Kandinsky's: to a whole number of latent frames, and one."""
    return frames if frames % factor == 1 else max(frames // factor * factor + 1, 1)


def _floored(frames: int, factor: int) -> int:
    """Latent frames are counted from below, and decoded to this."""
    return (frames - 1) // factor * factor + 1


def _cogvideox(frames: int, factor: int) -> int:
    """Its autoencoder keeps the first frame single only where the number of latent frames is odd."""
    latent = (frames - 1) // factor + 1
    return (latent - 1) * factor + 1 if latent % 2 else latent * factor


def _sections(frames: int, factor: int, window: int = 9) -> int:
    """Framepack: whole sections of `window` latent frames, and the picture that it starts from."""
    asked_each = (window - 1) * factor + 1
    return max(1, -(-frames // asked_each)) * window * factor + 1


def _asked_of_sections(frames: int, factor: int, window: int = 9) -> int:
    return max(1, (frames - 1) // (window * factor)) * ((window - 1) * factor + 1)


def chunks(frames: int, factor: int, window: int = 9) -> int:
    """Chunks of `window` latent frames that Helios makes one after the other for a video of `frames`."""
    each = (window - 1) * factor + 1
    return max(1, -(-frames // each))


def _chunked(frames: int, factor: int) -> int:
    whole = chunks(frames, factor) * (8 * factor + 1)
    return (whole - 1) // factor * factor + 1


ROUNDED = FrameRule("{k}k+1", _rounded)
FLOORED = FrameRule("{k}k+1", _floored)
FROM_FIVE = FrameRule("{k}k+1 (one, or from 17 on)", _rounded, allowed=lambda n, factor: n == 1 or n > 4 * factor)
"""The first four latent frames are normalised by those behind them."""
FROM_21 = FrameRule("{k}k+1 (from 21 on)", _rounded, allowed=lambda n, factor: n > 17)
"""Where SkyReels' diffusion forcing goes on from a video: more than the 17 frames that it sees again."""
ANY = FrameRule("any number of", lambda frames, factor: frames)
FIVE = FrameRule("5", lambda frames, factor: 5)
SEGMENTS = FrameRule("2 or more", lambda frames, factor: frames, allowed=lambda frames, factor: frames > 1)
COGVIDEOX = FrameRule("8k+1", _cogvideox, allowed=lambda frames, factor: frames % (2 * factor) == 1)
COGVIDEOX_PAIRS = FrameRule("8k", _cogvideox, allowed=lambda frames, factor: frames % (2 * factor) == 0)
"""Of CogVideoX 1.5 where it starts from a video: an even number of latent frames."""
LESS_FOUR = FrameRule("{k}k+1", lambda n, factor: _floored(n, factor) - 4, asked=lambda frames, factor: frames + 4)
"""The first four frames, those of the picture, are cut off."""
FRAMEPACK = FrameRule("36k+1", _sections, _asked_of_sections)
HELIOS = FrameRule("33, 65, 97, 129, 165, ... (whole chunks of 33)", _chunked)
ALLEGRO = FrameRule(
    "24, 40, 56, 72, 88, ...", ANY.made, allowed=lambda frames, factor: frames >= 24 and (frames - 24) % 16 == 0
)
"""What the tiles of its autoencoder, 24 frames with a step of 16, cover whole."""
