"""Whose heads a call has: all of a layer, or those of one of several processes that share them."""

from __future__ import annotations

from typing import Any

import torch


class HeadShare:
    """The heads of a layer, and what is decided over all of them. This one is a single process, which has all.

    Methods decide most things head by head. What they decide over all heads of a layer, such as one budget, goes
    through `gather` and `mine`, and what they choose by a head's number through `total` and `mine`: then several
    processes decide what one would. All of them make the same calls in the same order.
    """

    def total(self, heads: int) -> int:
        """Heads of the layer, where this process has so many."""
        return heads

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, h, ...]` of this process as `[B, H, ...]` of all, in the order of the heads."""
        return x

    def mine(self, x: torch.Tensor) -> torch.Tensor:
        """Of `[B, H, ...]` the heads of this process, `[B, h, ...]`."""
        return x

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes."""
        return x

    def computed(self, pairs: torch.Tensor) -> torch.Tensor | None:
        """Take note of the pairs that a call computed, `[B, h]` int64.

        Returns:
            Those of each process, `[ranks]`; None in a single one.
        """
        return None

    def taken_over(self, kept: dict[str, Any], before: HeadShare) -> dict[str, Any]:
        """What a method kept of the heads that this process had before, of those that it has now."""
        return kept


ALL_HEADS = HeadShare()
