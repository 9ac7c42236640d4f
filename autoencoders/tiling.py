"""Running a function of a picture on overlapping tiles, blended linearly where they overlap."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Tiles:
    """Tiles along one axis.

    Args:
        size: of a tile.
        stride: from the start of one to the start of the next; `size - stride` is the overlap.
        chosen: whether somebody chose the stride, which then stays where the size changes.
    """

    size: int
    stride: int
    chosen: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.stride <= self.size:
            raise ValueError(
                f"The stride of tiles is {self.stride} and their size {self.size}: the stride must be at least 1 and "
                "at most the size."
            )

    def starts(self, length: int) -> list[int]:
        """Where the tiles start. The last one ends with the axis, so all are of one size where it is long enough."""
        if length <= self.size:
            return [0]
        return [*range(0, length - self.size, self.stride), length - self.size]

    def overlap(self, length: int, scale: float = 1) -> int:
        """The most pixels that a tile shares with the next one, of an output of so many pixels per pixel."""
        size = round(min(self.size, length) * scale)
        pairs = itertools.pairwise(round(start * scale) for start in self.starts(length))
        return max((a + size - b for a, b in pairs), default=0)

    def scaled(self, factor: float) -> Tiles:
        """The same tiles in another unit."""
        return Tiles(round(self.size * factor), round(self.stride * factor))


def default_tile(factor: int) -> int:
    """Pixels of the side of a tile, if a latent pixel is `factor` pixels: 512, and at least 8 latent pixels."""
    return max(-(-512 // factor), 8) * factor


def default_stride(size: int, factor: int) -> int:
    """Pixels between the starts of two tiles of so many: three quarters, in whole latent pixels."""
    return max(size * 3 // 4 // factor, 1) * factor


def run_tiled(
    function: Callable[[torch.Tensor], Iterable[torch.Tensor]],
    x: torch.Tensor,
    rows: Tiles,
    columns: Tiles,
    scale: float,
    frames: int,
    together: int | None = None,
) -> torch.Tensor:
    """`function` of `x`, computed tile by tile.

    Args:
        function: maps `[B, ..., h, w]` to the frames of `[B, ..., frames, h*scale, w*scale]` in order, some at a time.
        x: `[B, ..., H, W]`.
        rows, columns: the tiles, in pixels of `x`.
        scale: pixels of the output per pixel of `x`.
        frames: of the output.
        together: of B, how many at a time; None for all.

    Returns:
        `[B, ..., frames, H*scale, W*scale]` in the dtype of `function`'s output. Blended in float32 at least, in which
        the sums of what overlaps with tiles to come are kept, and nothing else.
    """
    height, width = x.shape[-2:]
    down, across = _weights(height, rows, scale, x.device), _weights(width, columns, scale, x.device)
    total = None
    for first in range(0, x.shape[0], together or x.shape[0]):
        videos = slice(first, first + (together or x.shape[0]))
        below = right = None  # sums that the next row of tiles, and the next tile, are added to
        for row, (top, vertical) in enumerate(down):
            y, bottom = round(top * scale), _begin(down, row + 1, scale, round(height * scale))
            upper = 0 if row == 0 else round(down[row - 1][0] * scale) + vertical.shape[0] - y
            for column, (left, horizontal) in enumerate(across):
                z, end = round(left * scale), _begin(across, column + 1, scale, round(width * scale))
                known = 0 if column == 0 else round(across[column - 1][0] * scale) + horizontal.shape[0] - z
                weight, frame = vertical[:, None] * horizontal, 0
                for piece in function(x[videos, ..., top : top + rows.size, left : left + columns.size]):
                    precise = torch.promote_types(piece.dtype, torch.float32)
                    if total is None:
                        size = (frames, round(height * scale), round(width * scale))
                        total = piece.new_empty(x.shape[0], *piece.shape[1:-3], *size)
                    if below is None:
                        lead = (*piece.shape[:-3], frames)
                        below = piece.new_empty(*lead, rows.overlap(height, scale), total.shape[-1], dtype=precise)
                        right = piece.new_empty(*lead, piece.shape[-2], columns.overlap(width, scale), dtype=precise)
                    span = slice(frame, frame + piece.shape[-3])
                    frame = span.stop
                    summed = torch.zeros_like(piece, dtype=precise)
                    summed[..., :known] = right[..., span, :, :known]
                    summed[..., :upper, known:] = below[..., span, :upper, z + known : z + piece.shape[-1]]
                    summed.addcmul_(piece, weight)
                    # Pixels that no tile to come reaches are done.
                    total[videos, ..., span, y:bottom, z:end] = summed[..., : bottom - y, : end - z]
                    rest = summed[..., bottom - y :, : end - z]
                    below[..., span, : rest.shape[-2], z:end] = rest
                    rest = summed[..., end - z :]
                    right[..., span, :, : rest.shape[-1]] = rest
                    del piece, summed, rest  # while the next one is made
    return total


def _begin(tiles: list[tuple[int, torch.Tensor]], number: int, scale: float, end: int) -> int:
    """Where a tile starts in the output; behind the last one, where the output ends."""
    return round(tiles[number][0] * scale) if number < len(tiles) else end


def _weights(length: int, tiles: Tiles, scale: float, device: torch.device) -> list[tuple[int, torch.Tensor]]:
    """Where each tile starts, and the weights of its output pixels: over all tiles they sum to 1 at each pixel."""
    ramps = [
        (start, _ramp(round(min(tiles.size, length) * scale), tiles, scale, device)) for start in tiles.starts(length)
    ]
    total = torch.zeros(round(length * scale), device=device)
    for start, ramp in ramps:
        total[round(start * scale) :][: ramp.shape[0]] += ramp
    return [(start, ramp / total[round(start * scale) :][: ramp.shape[0]]) for start, ramp in ramps]


def _ramp(length: int, tiles: Tiles, scale: float, device: torch.device) -> torch.Tensor:
    """Rises over the overlap, is level, and falls; never zero."""
    overlap = min(round((tiles.size - tiles.stride) * scale), length)
    place = torch.arange(length, device=device) + 0.5
    edge = torch.minimum(place, length - place) / max(overlap, 1)
    return edge.clamp(max=1.0)
