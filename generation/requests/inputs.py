"""What a video starts from, pictures or a video, at its size: from files, or as PIL, numpy or torch have them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BadInput
from .values import file_name

if TYPE_CHECKING:
    from fractions import Fraction

    from PIL import Image

    from ..media.files import Media


def open_picture(field: str, picture: Any) -> Image.Image:
    """A picture in sRGB, upright and opaque.

    Args:
        field: that it is given for.
        picture: a file, a PIL picture, or an array `[H, W, 3]` of bytes or of floats in [0, 1].

    Raises:
        BadInput: it is none of these, or the file is no picture.
    """
    from PIL import Image

    from ...pipelines.errors import first_line
    from ..media.pictures import as_shown, read_picture

    try:
        if isinstance(picture, str | os.PathLike):
            return read_picture(file_name(field, picture))
        if isinstance(picture, Image.Image):
            return as_shown(picture)
    except (OSError, ValueError) as error:
        raise BadInput(field, f"cannot be used: {first_line(error).rstrip('.')}") from error
    return Image.fromarray(_bytes(field, _array(picture), "[H, W, 3]"))


def fitted_picture(field: str, picture: Any, width: int, height: int) -> tuple[Image.Image, str]:
    """A picture, see `open_picture`, at a size, and in words what was cut off for it; "" for nothing."""
    from ..media.pictures import fit_picture

    fitted, note = fit_picture(open_picture(field, picture), width, height)
    return fitted, note and f"{field}: {note}"


@dataclass(frozen=True, eq=False)
class VideoSource:
    """A video to start from; of a file no more is read than what is asked for.

    Args:
        frames: how many there are.
        fps: frames per second of a file; of a variable rate, the mean.
        file, media: where it is one.
        given: `[F, H, W, 3]` of bytes otherwise.
        field: that it is given for.
        more: whether it goes on after these frames, which are all that is used.
    """

    frames: int
    fps: Fraction | None = None
    file: Path | None = None
    media: Media | None = None
    given: np.ndarray | None = None
    field: str = "video"
    more: bool = False

    @property
    def rate(self) -> float | None:
        """Frames per second at which a file of a variable rate is sampled by time; None where each frame is taken.

        One frame after the other would be played faster in one place and slower in another.
        """
        return float(self.media.fps) if self.media is not None and self.media.variable else None

    def read(self, frames: int, width: int, height: int) -> tuple[np.ndarray, tuple[str, ...]]:
        """The first frames at a size, `[frames, height, width, 3]` of bytes, and in words what was left out for it.

        Raises:
            BadInput: the file is damaged.
        """
        from PIL import Image

        from ..media.pictures import fit_picture

        notes = list(self._told_of(frames))
        if self.given is None:
            made, note = self._decoded(frames, width, height)
        else:
            fitted = [fit_picture(Image.fromarray(frame), width, height) for frame in self.given[:frames]]
            made, note = np.stack([np.asarray(picture) for picture, _ in fitted]), fitted[0][1]
        return made, (*notes, *([f"{self.field}: {note}"] if note else []))

    def _told_of(self, frames: int) -> Iterator[str]:
        """In words, which of its frames are used where so many are asked for."""
        if self.rate is None:
            if frames < self.frames or self.more:
                of = "its frames" if self.more else f"its {self.frames} frames"
                yield f"{self.field}: of {of}, the first {frames} are used."
            return
        if frames < self.frames:
            whole, used = self.frames / self.rate, frames / self.rate
            yield f"{self.field}: of its {whole:.3g} s, the first {used:.3g} s are used."
        uneven = "its frames are not evenly spaced in time: it is sampled at its mean rate"
        yield f"{self.field}: {uneven}, {self.rate:.4g} frames per second."

    def _decoded(self, frames: int, width: int, height: int) -> tuple[np.ndarray, str]:
        """Scaled while it is read, so that no more is held than the result."""
        from ...pipelines.errors import first_line
        from ..media.files import Cut
        from ..media.pictures import Fit
        from ..media.video_reader import read_frames

        assert self.file is not None and self.media is not None
        fit = Fit.of(self.media.width, self.media.height, width, height)
        left, top = fit.left / max(1, fit.wide - width), fit.top / max(1, fit.high - height)
        cut = Cut(0, frames, self.rate, height, width, left=left, top=top)
        try:
            return read_frames(self.file, self.media, cut), fit.words()
        except OSError as error:
            raise BadInput(self.field, f"cannot be used: {first_line(error).rstrip('.')}") from error


def open_video(video: Any, field: str = "video") -> VideoSource:
    """A video, of which a file is not decoded yet.

    Args:
        video: a file; files, PIL pictures or arrays in a list; an array `[F, H, W, 3]` of bytes or of floats in [0, 1].
        field: that it is given for.

    Raises:
        BadInput: it is none of these, the file is no video, or the pictures differ in size.
    """
    from ...pipelines.errors import first_line
    from ..media.video_reader import probe_video

    if isinstance(video, VideoSource):
        return video
    if isinstance(video, Path):
        try:
            media = probe_video(video)
        except OSError as error:
            raise BadInput(field, f"cannot be used: {first_line(error).rstrip('.')}") from error
        return VideoSource(media.frames, media.fps, file=video, media=media, field=field)
    if isinstance(video, list | tuple):
        pictures = [np.asarray(open_picture(field, picture)) for picture in video]
        sizes = sorted({f"{picture.shape[1]}x{picture.shape[0]}" for picture in pictures})
        if len(sizes) > 1:
            raise BadInput(field, f"has pictures of several sizes ({', '.join(sizes)})", "Give them one size.")
        video = np.stack(pictures) if pictures else np.empty((0, 0, 0, 3), np.uint8)
    frames = _bytes(field, _array(video), "[F, H, W, 3]")
    return VideoSource(len(frames), given=frames, field=field)


def _array(given: Any) -> Any:
    """A tensor of torch as an array; anything else as it is."""
    if not (hasattr(given, "detach") and hasattr(given, "cpu")):  # open files have the first, which closes them
        return given
    tensor = given.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()  # numpy has no bfloat16


def _bytes(field: str, given: Any, shape: str) -> np.ndarray:
    """An array as bytes. Raise BadInput for one of another shape, dtype or range, and for what is no array."""
    array = np.asarray(given) if hasattr(given, "__array__") else None
    told = f"{type(given).__name__}" if array is None else f"{array.dtype} {list(array.shape)}"
    if array is not None and array.ndim == shape.count(",") + 1 and array.shape[-1] == 3 and array.size:
        if array.dtype == np.uint8:
            return array
        if np.issubdtype(array.dtype, np.floating):
            if array.min() >= 0 and array.max() <= 1:  # neither holds with a NaN
                return (array * 255).round().astype(np.uint8)
            told += f" from {array.min():g} to {array.max():g}"
    whole = shape.startswith("[F")
    which = "each of its pictures" if field.endswith("video") and not whole else "it"
    kinds = "a file, a list of pictures" if whole else "a file, a PIL picture"
    raise BadInput(field, f"{which} must be {kinds}, or an array {shape} of bytes or of floats in [0, 1]", value=told)
