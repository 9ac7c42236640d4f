"""What stands for the keys that a plan skips: a key and a value per cluster, or per tile and cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class SkippedClusters:
    """A key and a value that stand for each key cluster of a `BlockPlan` made from clusters, where a tile skips it.

    A tile reads the clusters it selects token by token, and each of the others as one key. There are two kinds.

    - *One for all tiles*, the mean key and value: `size * exp(q . mean k)` stands for the sum of `exp(q . k)`. By
      Jensen's inequality that is never too much; it is exact where the keys of a cluster are equal. SVG2's selection
      uses the same estimate. SVG-EAR (arXiv 2603.08982) attends to it, and chooses the clusters to skip by the error
      that this leaves, which is the larger half of it: `SVG2(compensate=True, route="error")`.
      With a bias for each tile it is `exp(bias + scale * q . mean k)`: `Tangent` without its probe.
    - *One for each tile*, with a bias: `exp(bias + scale * q . k)` stands for that sum. `Tangent` sets an expansion of
      the log of the sum at the tile's mean query.

    A stand-in has one value for all queries of a tile, but the mean value of a cluster moves with the query. To first
    order what all skipped clusters move by together is linear in the query, so one matrix for each tile holds it: with
    `slope`, `(q - centre) @ slope` is added to the output.

    Args:
        key, value: `[B, H, C, D]`, or `[B, H, T, C, D]` for each of the plan's tiles; float32 or the dtype of the
            keys, in the order of the plan's `selection`.
        bias: `[B, H, T, C]` float32, for as many batch entries and heads, or more where keys are for 1; None is the log
            of the size, for the first kind alone.
        slope: `[B, H, S, D, D]`, of the first S tiles (others have none), a query's channels before those of the
            output; float32 or the dtype of the keys. None adds nothing.
        centre: `[B, H, S, D]`, the query at which nothing is added; None is 0.

    Raises:
        ValueError: tables for each tile without a bias, a slope that is not square, a centre without a slope.
    """

    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None = None
    slope: torch.Tensor | None = None
    centre: torch.Tensor | None = None

    def __post_init__(self) -> None:
        wrong = self.of_each_tile if self.bias is None else self.bias.ndim != 4
        if wrong or self.key.ndim not in (4, 5) or self.key.shape != self.value.shape:
            bias = None if self.bias is None else list(self.bias.shape)
            raise ValueError(
                f"SkippedClusters needs key and value [B, H, C, D], or [B, H, T, C, D] with a bias [B, H, T, C], got "
                f"{list(self.key.shape)}, {list(self.value.shape)} and {bias}."
            )
        lead, dim = self.key.shape[:2], self.key.shape[-1]
        leads = {"keys": lead} | ({} if self.bias is None else {"a bias": self.bias.shape[:2]})
        if any(len(set(sizes) - {1}) > 1 for sizes in zip(*leads.values(), strict=True)):
            told = " and ".join(f"{name} for {list(x)}" for name, x in leads.items())
            raise ValueError(
                f"SkippedClusters has {told} batch entries and heads: each number must be the same, or 1, which holds "
                "for all."
            )
        slope, centre = (None if x is None else tuple(x.shape) for x in (self.slope, self.centre))
        right = slope is None or (len(slope) == 5 and slope[:2] == lead and slope[3:] == (dim, dim))
        if not right or (centre is not None and (slope is None or centre != slope[:4])):
            raise ValueError(
                f"SkippedClusters needs slope [B, H, S, D, D] and centre [B, H, S, D] with key {list(self.key.shape)}, "
                f"got {slope} and {centre}."
            )

    def check(self, tiles: int, clusters: int, device: torch.device) -> None:
        """Raise a ValueError where these are not for so many tiles and clusters of a plan on a device."""
        wanted = ([tiles] if self.of_each_tile else []) + [clusters]
        given = list(self.key.shape[2:-1])
        bias = None if self.bias is None else list(self.bias.shape[2:])
        slopes = 0 if self.slope is None else self.slope.shape[2]
        if given != wanted or bias not in (None, [tiles, clusters]) or slopes > tiles:
            raise ValueError(
                f"SkippedClusters has keys for {given} and a bias for {bias} tiles and clusters, and {slopes} slopes, "
                f"but the plan's selection has {tiles} tiles and {clusters} clusters."
            )
        if self.key.device != device:
            raise ValueError(f"SkippedClusters lies on {self.key.device}, and the plan on {device}.")

    @property
    def lead(self) -> tuple[int, int]:
        """For how many batch entries and heads there are tables; 1 holds for all."""
        lead = self.key.shape[:2]
        return tuple(lead if self.bias is None else torch.broadcast_shapes(lead, self.bias.shape[:2]))

    @property
    def tables(self) -> tuple[torch.Tensor | None, ...]:
        """All of them, in the order of the fields."""
        return self.key, self.value, self.bias, self.slope, self.centre

    @property
    def of_each_tile(self) -> bool:
        """Whether each tile has keys and values of its own."""
        return self.key.ndim == 5

    def side_by_side(self) -> torch.Tensor | None:
        """Keys and values as one table, `[..., 2D]`, where they lie so in memory; None where they do not."""
        key, value = self.key, self.value
        dim = key.shape[-1]
        together = (
            key.dtype == value.dtype
            and key.stride() == value.stride()
            and key.stride(-1) == 1
            and key.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
            and value.storage_offset() == key.storage_offset() + dim
        )
        return key.as_strided((*key.shape[:-1], 2 * dim), key.stride()) if together else None

    def to(self, device: torch.device | str) -> SkippedClusters:
        """The same on another device."""
        return self.with_each(lambda x: x.to(device))

    def with_each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> SkippedClusters:
        """The same with what `change` makes of each table."""
        return SkippedClusters(*(None if x is None else change(x) for x in self.tables))
