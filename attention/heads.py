"""Whose heads a call has: all of a layer, or those of one of several processes that share them."""

from __future__ import annotations

import torch


class HeadShare:
    """The heads of a layer, and what is decided over all of them. This one is a single process, which has all.

    Methods decide most things head by head. What they decide over all heads of a layer, such as one budget, goes
    through `gather` and `mine`, and what they choose by a head's number through `total` and `mine`: then several
    processes decide what one would.
    """

    ranks = 1
    """Processes that share the heads of a layer."""

    def total(self, heads: int) -> int:
        """Heads of the layer, where this process has so many."""
        return heads

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, h, ...]` of this process as `[B, H, ...]` of all, in the order of the heads."""
        return x

    def mine(self, x: torch.Tensor) -> torch.Tensor:
        """Of `[B, H, ...]` the heads of this process, `[B, h, ...]`."""
        return x

    def each(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor of one shape in all processes, `[ranks, ...]`."""
        return x[None]


ALL_HEADS = HeadShare()
