"""What stands for the keys that a plan skips: one key and one value per cluster."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class SkippedClusters:
    """The mean key and the mean value of each key cluster of a `BlockPlan` made from clusters.

    A tile reads the clusters it selects token by token, and each of the others as one key that counts as often as the
    cluster has tokens: `size * exp(q . mean k)` stands for the sum of `exp(q . k)`. By Jensen's inequality that is
    never too much; it is exact where the keys of a cluster are equal. (SVG2's selection uses the same estimate;
    attending to it is what SVG-EAR, July 2026, calls centroid compensation.)

    Args:
        k_mean, v_mean: `[B, H, C, D]` float32, in the order of the plan's `selection`.
    """

    k_mean: torch.Tensor
    v_mean: torch.Tensor

    def to(self, device: torch.device | str) -> SkippedClusters:
        """The same on another device."""
        return SkippedClusters(self.k_mean.to(device), self.v_mean.to(device))
