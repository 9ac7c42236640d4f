"""Pictures from files, as people see them, and at the size that a model wants."""

from __future__ import annotations

import logging
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL import Image, ImageCms

logger = logging.getLogger(__name__)

BACKGROUND = "white"
"""What shows through where a picture is transparent; on white is how browsers show one."""

_ORIENTATION = 274
"""The EXIF tag of how a picture is turned."""
_BITS, _PHOTOMETRIC = 258, 262
"""The TIFF tags of the bits a sample has, and of whether 0 is white (0) or black (1)."""
_ROUNDING = 2
"""Levels of 256 by which a profile of sRGB, such as that of a camera, may be off it."""
_ONE_PICTURE = ("MPO", "PSD", "ICO", "ICNS")
"""Formats whose further pictures are previews, layers or sizes of the first one, and not frames."""
_FILTERS = threading.Lock()
"""While filters of warnings are set, which are the process's: two threads at once would leave one of them behind."""


class PictureError(OSError):
    """A file that is no picture, a damaged one, or one whose colours are not defined; the message names it."""


def read_picture(path: str | Path, background: str | tuple[int, int, int] = BACKGROUND) -> Image.Image:
    """A picture as people see it, in 8-bit sRGB.

    It is turned as its EXIF says, its colours are those of its ICC profile, 16 bits a channel are scaled to 8, and what
    is transparent is laid on `background`.

    Args:
        path: of the file.
        background: a colour as PIL knows it.

    Returns:
        A PIL image of mode "RGB".

    Raises:
        PictureError: the file cannot be read, is damaged, holds several frames, has more pixels than PIL reads
            (twice `PIL.Image.MAX_IMAGE_PIXELS`, 179 million), or numbers whose black and white it does not tell (32
            bits or floating point).
    """
    with _opened(path) as image:
        _check_single(image)
        image.load()
        return as_shown(image, str(path), background)


def as_shown(
    image: Image.Image, name: str = "a picture", background: str | tuple[int, int, int] = BACKGROUND
) -> Image.Image:
    """A picture as PIL has it, in any of its modes, as people see it; see `read_picture`.

    Args:
        image: loaded.
        name: what a warning calls it.
        background: a colour as PIL knows it.

    Returns:
        A PIL image of mode "RGB".

    Raises:
        ValueError: numbers whose black and white are not told.
    """
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    # What `exif_transpose` makes has no file any more, and with that no tags.
    eight = _eight_bits(upright, image)
    colours, alpha = _in_srgb(eight, name)
    if alpha is None:
        return colours
    below = Image.new("RGB", colours.size, background)
    below.paste(colours, mask=alpha)
    return below


def picture_size(path: str | Path) -> tuple[int, int]:
    """Height and width of a picture as it is shown, from its header; all of the file is read, but not decoded.

    Raises:
        PictureError: it is no picture, damaged where that shows, has too many pixels, or holds several frames.
    """
    with _opened(path) as image:
        _check_single(image)
    with _opened(path) as image:
        image.verify()
    with _opened(path) as image:  # nothing can be asked of one that was verified
        # PIL turns TIFF by itself, and its size is the one that is shown.
        turned = image.format != "TIFF" and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)  # by a quarter
        return (image.width, image.height) if turned else (image.height, image.width)


def fit_picture(
    image: Image.Image,
    width: int,
    height: int,
    how: Literal["crop", "pad"] = "crop",
    background: str | tuple[int, int, int] = "black",
) -> tuple[Image.Image, str]:
    """A picture at a size, its proportions kept.

    Args:
        image: of mode "RGB".
        width, height: pixels.
        how: "crop" scales it to cover the size and cuts off what sticks out, equally on both sides; "pad" scales it to
            lie inside and fills up with `background`.
        background: a colour as PIL knows it.

    Returns:
        The picture, and in words what was cut off or added; "" for nothing.

    Raises:
        ValueError: a size below 1, or another `how`.
    """
    from PIL import Image

    if min(width, height) < 1:
        raise ValueError(f"a picture of {width}x{height} cannot be made: width and height must be at least 1.")
    if how not in ("crop", "pad"):
        raise ValueError(f'how is {how!r}: it must be "crop" or "pad".')
    fit = Fit.of(image.width, image.height, width, height, how)
    scaled = image.resize((fit.wide, fit.high), Image.Resampling.LANCZOS)
    if (fit.wide, fit.high) == (width, height):
        return scaled, ""
    fitted = Image.new("RGB", (width, height), background)
    fitted.paste(scaled, (-fit.left, -fit.top))
    return fitted, fit.words(background)


@dataclass(frozen=True)
class Fit:
    """How a picture gets a size: it is scaled, its proportions kept, and what sticks out is cut off, or filled up.

    Args:
        of_width, of_height: pixels of the picture.
        wide, high: of the scaled one.
        width, height: of the result.
    """

    of_width: int
    of_height: int
    wide: int
    high: int
    width: int
    height: int

    @classmethod
    def of(cls, of_width: int, of_height: int, width: int, height: int, how: Literal["crop", "pad"] = "crop") -> Fit:
        """For a picture and a size; see `fit_picture`."""
        scaled = covering if how == "crop" else _inside
        return cls(of_width, of_height, *scaled(of_width, of_height, width, height), width, height)

    @property
    def left(self) -> int:
        """What is cut off there, negative where something is added; the odd pixel is the right side's."""
        return int((self.wide - self.width) / 2)

    @property
    def top(self) -> int:
        """Likewise; the odd pixel is at the bottom."""
        return int((self.high - self.height) / 2)

    def words(self, background: str | tuple[int, int, int] = "black") -> str:
        """What is cut off or added, in words; "" for nothing."""
        if (self.wide, self.high) == (self.width, self.height):
            return ""
        if self.wide != self.width:
            unit, amounts = "column", {"left": self.left, "right": self.wide - self.width - self.left}
        else:
            unit, amounts = "row", {"top": self.top, "bottom": self.high - self.height - self.top}
        parts = [f"{abs(n)} {unit}{'s' if abs(n) > 1 else ''} at the {side}" for side, n in amounts.items() if n]
        done = "cut off" if self.wide + self.high > self.width + self.height else f"added in {background}"
        scaled = f"{self.of_width}x{self.of_height} is scaled to {self.wide}x{self.high}"
        return f"{scaled}; {done}: {' and '.join(parts)}."


def covering(width: int, height: int, over_width: int, over_height: int, enlarge: float = 1.0) -> tuple[int, int]:
    """Width and height, in pixels, of a picture scaled until it covers a size, and then by `enlarge`, 1 or more."""
    factor = max(over_width / width, over_height / height) * enlarge
    return max(over_width, round(width * factor)), max(over_height, round(height * factor))


def _inside(width: int, height: int, in_width: int, in_height: int) -> tuple[int, int]:
    factor = min(in_width / width, in_height / height)
    return min(in_width, max(1, round(width * factor))), min(in_height, max(1, round(height * factor)))


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """A PIL image; what is wrong with the file is a `PictureError`."""
    from PIL import Image, UnidentifiedImageError

    # What PIL's readers raise for damaged files, each its own.
    damage = (
        *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError),
        *(RuntimeError, struct.error, zlib.error),
    )
    try:
        # Not by its path: PIL would map a file that is not compressed, and map one that is turned in the wrong shape.
        with open(path, "rb") as file:
            with _FILTERS, warnings.catch_warnings():
                # PIL warns from half of its bound on, of an attack. It opens what it does not read yet.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                opened = Image.open(file)
            with opened as image:
                yield image
    except UnidentifiedImageError as error:
        raise PictureError(f"{path} is no picture, or one of a kind that is not known here.") from error
    except Image.DecompressionBombError as error:
        has = re.search(r"(\d+) pixels", str(error))  # in PIL's words alone: it opens no such picture
        told = f"{int(has[1]):,} pixels" if has else "too many pixels"
        most = f"at most {2 * (Image.MAX_IMAGE_PIXELS or 0):,} are read"
        raise PictureError(f"{path} has {told}: {most}. Give a smaller one.") from error
    except FileNotFoundError as error:
        raise PictureError(f"{path}: no such file.") from error
    except damage as error:
        raise PictureError(f"{path} cannot be read as a picture: {error}.") from error


def _check_single(image: Image.Image) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format not in _ONE_PICTURE:
        raise ValueError(f"it holds {frames} frames or pages: give one of them, as a file of its own")


def _eight_bits(image: Image.Image, source: Image.Image) -> Image.Image:
    """A picture of 8 bits a channel, of the same content.

    Args:
        image: upright.
        source: as it was opened, which knows its tags.
    """
    import numpy as np
    from PIL import Image

    tags = getattr(source, "tag_v2", {})
    if image.mode == "F" or (image.mode == "I" and source.format != "PPM"):
        kind = "floating point" if image.mode == "F" else "32 bits"
        raise ValueError(f"its numbers are in {kind}, and it does not say which are black and white; save it as PNG")
    if not image.mode.startswith("I"):
        return image
    # PIL's own conversion cuts off at 255. PNM counts to 65535 as well, after PIL.
    bits = tags.get(_BITS, (16,))[0]
    values = np.asarray(image).astype(np.float64)
    whole = np.round(values * (255 / (2**bits - 1))).clip(0, 255).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:
        whole = 255 - whole
    made = Image.fromarray(whole, "L")
    if isinstance(clear := image.info.get("transparency"), int):
        made.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8), "L"))
    made.info["icc_profile"] = image.info.get("icc_profile")
    return made


def _in_srgb(image: Image.Image, name: str) -> tuple[Image.Image, Image.Image | None]:
    """The colours of an 8-bit picture as "RGB" in sRGB, and how opaque it is ("L"), or None where all is."""
    profile = image.info.get("icc_profile")
    alpha = None
    if image.has_transparency_data:
        is_grey = image.mode in ("1", "L", "LA", "La")  # and stays so, since its profile is for grey
        whole = image.convert("LA" if is_grey else "RGBA")
        alpha = whole.getchannel("A")
        image = whole.convert("L" if is_grey else "RGB")
    managed = _managed(image, profile, name) if profile else None
    return image.convert("RGB") if managed is None else managed, alpha


def _managed(image: Image.Image, profile: bytes, name: str) -> Image.Image | None:
    """The picture converted by its ICC profile; None where that is sRGB already, or is of no use, which is said."""
    import io

    from PIL import ImageCms

    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = own.profile.xcolor_space.strip()
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space)
        if mode not in _modes_of_profiles(image.mode):
            raise ImageCms.PyCMSError(f"it is for {space}, and the picture is {image.mode}")
        to_srgb = ImageCms.buildTransform(own, ImageCms.createProfile("sRGB"), mode, "RGB")
        return None if _keeps_colours(to_srgb, mode) else ImageCms.applyTransform(image.convert(mode), to_srgb)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        logger.warning("%s: its colour profile cannot be used (%s), so it is taken for sRGB.", name, error)
        return None


def _modes_of_profiles(mode: str) -> tuple[str, ...]:
    """For which modes the profile of a picture can be: its own, and for a grey one RGB as well, of equal parts."""
    if mode in ("1", "L"):
        return ("L", "RGB")
    return ("CMYK",) if mode == "CMYK" else ("RGB",)


def _keeps_colours(to_srgb: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether the colours that a profile means are those of sRGB, whatever it is called, but for its rounding."""
    import numpy as np
    from PIL import Image, ImageCms

    if mode == "CMYK":
        return False
    values = np.arange(0, 256, 1 if mode == "L" else 15, dtype=np.uint8)
    sample = values[None] if mode == "L" else np.stack(np.meshgrid(values, values, values), -1).reshape(1, -1, 3)
    picture = Image.fromarray(np.ascontiguousarray(sample))
    made = np.asarray(ImageCms.applyTransform(picture, to_srgb)).astype(int)
    return bool(np.abs(made - np.asarray(picture.convert("RGB"))).max() <= _ROUNDING)
