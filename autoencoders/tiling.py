"""Running a function of a picture on overlapping tiles, blended linearly where they overlap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tiles:
    """Tiles along one axis.

    Args:
        size: of a tile.
        stride: from the start of one to the start of the next; `size - stride` is the overlap.
    """

    size: int
    stride: int

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

    def scaled(self, factor: float) -> Tiles:
        """The same tiles in another unit."""
        return Tiles(round(self.size * factor), round(self.stride * factor))


def default_tile(factor: int) -> int:
    """Pixels of the side of a tile, if a latent pixel is `factor` pixels: 512, and at least 8 latent pixels."""
    return max(-(-512 // factor), 8) * factor


def run_tiled(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, rows: Tiles, columns: Tiles, scale: float
) -> torch.Tensor:
    """`function` of `x`, computed tile by tile.

    Args:
        function: maps `[..., h, w]` to `[..., h*scale, w*scale]`.
        x: `[..., H, W]`.
        rows, columns: the tiles, in pixels of `x`.
        scale: pixels of the output per pixel of `x`.

    Returns:
        In the dtype of `function`'s output. Rows of tiles are blended in float32 at least, one at a time.
    """
    height, width = x.shape[-2:]
    down, across = _weights(height, rows, scale, x.device), _weights(width, columns, scale, x.device)
    total = band = None
    for number, (top, vertical) in enumerate(down):
        y = round(top * scale)
        for left, horizontal in across:
            tile = function(x[..., top : top + rows.size, left : left + columns.size])
            if total is None:
                total = tile.new_empty(*tile.shape[:-2], round(height * scale), round(width * scale))
            if band is None:
                precise = torch.promote_types(tile.dtype, torch.float32)
                band = tile.new_zeros(*tile.shape[:-2], vertical.shape[0], total.shape[-1], dtype=precise)
            z = round(left * scale)
            band[..., z : z + tile.shape[-1]].addcmul_(tile, vertical[:, None] * horizontal)
            del tile
        # Rows that the next tiles do not reach are done; what they share with this one goes over to them.
        end = round(down[number + 1][0] * scale) if number + 1 < len(down) else total.shape[-2]
        total[..., y:end, :] = band[..., : end - y, :]
        _shift(band, end - y)
    return total


def _shift(band: torch.Tensor, rows: int) -> None:
    """Moves `band` up by `rows`, in steps that do not overlap so that nothing is copied aside; zeros come after."""
    kept = band.shape[-2] - rows
    for place in range(0, kept, rows):
        stop = min(place + rows, kept)
        band[..., place:stop, :] = band[..., place + rows : stop + rows, :]
    band[..., kept:, :] = 0


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
