"""A picture of what is trained on: frames of some clips as the model gets them, each with its caption and its size."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..distributed.generators import Place, derive_seed
from ..logs.pictures import pixels_of, write_picture, written_to
from ..settings import SizeSettings
from .dataset import ClipDataset
from .held_out import HeldOut
from .sampler import Pick, without

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

FILE = "clips.png"
FRAMES = 3
"""Of each clip: the first, the one in the middle and the last; one of an image."""
_SIDE, _GAP, _MARGIN, _COLUMNS = 200, 6, 16, 2
_FONT = 14
_LINE = 20


def write_sheet(
    dataset: ClipDataset, sizes: Sequence[SizeSettings], held: HeldOut, count: int, folder: Path
) -> Path | None:
    """Write the picture into a folder; where that fails, or no clip can be decoded, say so.

    Args:
        dataset: of the clips.
        sizes: of those that are trained on.
        held: what is measured, and not shown.
        count: of clips, at most; 0 for no picture.
        folder: of the run.

    Returns:
        The file; None where there is none.
    """
    from PIL import Image

    cells = []
    for pick in shown_clips(dataset, sizes, held, count):
        try:
            clip = dataset.pixels(pick)
        except OSError as error:
            logger.warning("%s; %s is without it.", error, FILE)
            continue
        chosen = sorted({0, (clip.shape[1] - 1) // 2, clip.shape[1] - 1})
        frames = [Image.fromarray(pixels_of(clip[:, number].permute(1, 2, 0))) for number in chosen]
        told = "{}x{}x{}".format(*pick.size)
        told += f", of which frames {', '.join(map(str, chosen))}" if len(chosen) > 1 else ""
        cells.append(_cell(frames, dataset.caption(pick.index), told))
    if not cells:
        return None
    written = []
    with written_to(folder, "the picture of the data"):
        write_picture(_table(cells), folder / FILE)
        written.append(folder / FILE)
    return written[0] if written else None


def shown_clips(dataset: ClipDataset, sizes: Sequence[SizeSettings], held: HeldOut, count: int) -> Iterator[Pick]:
    """Clips of each size in its turn, evenly spaced among those that are trained on; of endless ones, any."""
    members = without(dataset.members(sizes), held.clips)
    numbers = range(len(sizes)) if members is None else [n for n in range(len(sizes)) if members[n]]
    listed = {} if members is None else {n: list(dict.fromkeys(members[n])) for n in numbers}
    shares = dict.fromkeys(numbers, 0)
    while sum(shares.values()) < count:
        open_to_more = [n for n in numbers if members is None or shares[n] < len(listed[n])]
        if not open_to_more:
            break
        for number in open_to_more[: count - sum(shares.values())]:
            shares[number] += 1
    total = sum(shares.values())
    place = 0
    for number, share in shares.items():
        for turn in range(share):
            seed = derive_seed("contact sheet", place)
            index = seed if members is None else listed[number][turn * (len(listed[number]) - 1) // max(1, share - 1)]
            size = sizes[number]
            yield Pick(index, (size.frames, size.height, size.width), Place(0, place, total, seed))
            place += 1


def _cell(frames: Sequence[Image.Image], caption: str, told: str) -> Image.Image:
    """The frames of a clip side by side, above them the beginning of its caption and what it is."""
    from PIL import Image, ImageDraw

    width = FRAMES * _SIDE + (FRAMES - 1) * _GAP
    largest = max(frames[0].size)
    size = (max(1, round(frames[0].width * _SIDE / largest)), max(1, round(frames[0].height * _SIDE / largest)))
    cell = Image.new("RGB", (width, 2 * _LINE + size[1]), "white")
    draw, font = ImageDraw.Draw(cell), _font()
    text = " ".join(caption.split()) or "(no caption)"
    if font.getlength(text) > width:
        while text and font.getlength(text + "…") > width:
            text = text[:-1]
        text += "…"
    draw.text((0, 0), text, fill="#222222", font=font)
    draw.text((0, _LINE), told, fill="#666666", font=font)
    for number, frame in enumerate(frames):
        cell.paste(frame.resize(size, Image.Resampling.LANCZOS), (number * (size[0] + _GAP), 2 * _LINE))
    return cell


def _font() -> Any:
    """One for Latin, Greek and Cyrillic letters, which matplotlib brings; PIL's own has no accents."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), _FONT)


def _table(cells: Sequence[Image.Image]) -> np.ndarray:
    """All cells, some in a row."""
    from PIL import Image

    rows = [cells[first : first + _COLUMNS] for first in range(0, len(cells), _COLUMNS)]
    width = _MARGIN + min(len(cells), _COLUMNS) * (cells[0].width + _MARGIN)
    height = _MARGIN + sum(max(cell.height for cell in row) + _MARGIN for row in rows)
    sheet, top = Image.new("RGB", (width, height), "white"), _MARGIN
    for row in rows:
        for number, cell in enumerate(row):
            sheet.paste(cell, (_MARGIN + number * (cell.width + _MARGIN), top))
        top += max(cell.height for cell in row) + _MARGIN
    return np.asarray(sheet)
