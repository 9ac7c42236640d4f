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


def run_tiled(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, rows: Tiles, columns: Tiles, scale: float
) -> torch.Tensor:
    """`function` of `x`, computed tile by tile.

    Args:
        function: maps `[..., h, w]` to `[..., h*scale, w*scale]`.
        x: `[..., H, W]`.
        rows, columns: the tiles, in pixels of `x`.
        scale: pixels of the output per pixel of `x`.
    """
    height, width = x.shape[-2:]
    total, weight = None, None
    for top in rows.starts(height):
        for left in columns.starts(width):
            tile = function(x[..., top : top + rows.size, left : left + columns.size])
            h, w = tile.shape[-2:]
            y, z = round(top * scale), round(left * scale)
            if total is None:
                shape = (*tile.shape[:-2], round(height * scale), round(width * scale))
                total = tile.new_zeros(shape)
                weight = tile.new_zeros(shape[-2:], dtype=torch.float32)
            ramp = _ramp(h, rows, scale, tile.device)[:, None] * _ramp(w, columns, scale, tile.device)
            total[..., y : y + h, z : z + w] += tile * ramp.to(tile.dtype)
            weight[y : y + h, z : z + w] += ramp
    return total.div_(weight.to(total.dtype))


def _ramp(length: int, tiles: Tiles, scale: float, device: torch.device) -> torch.Tensor:
    """Weights of a tile, rising over the overlap, level, and falling; never zero."""
    overlap = min(round((tiles.size - tiles.stride) * scale), length)
    place = torch.arange(length, device=device) + 0.5
    edge = torch.minimum(place, length - place) / max(overlap, 1)
    return edge.clamp(max=1.0)
