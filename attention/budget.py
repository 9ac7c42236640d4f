"""How many pairs of clusters a layer computes: as many as a density allows, or as an error of the output asks for."""

from __future__ import annotations

import torch

from .clusters import Clusters, spend
from .heads import HeadShare
from .layout import VideoLayout
from .running_sum import running_sum


class Budget:
    """The pairs of query and key clusters of all heads of a layer, best first, and what each leaves when it is skipped.

    Args:
        pairs: squared error, rank and cost of each pair, `[B, h, Cq, Ck]` (`clusters.rank_pairs`).
        outputs: of the centroids, `[B, h, Cq, D]`: errors are relative to them.
        queries, keys: the clusters, both with the sizes of each query head.
        heads: which of the heads these are.
    """

    def __init__(
        self,
        pairs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        outputs: torch.Tensor,
        queries: Clusters,
        keys: Clusters,
        heads: HeadShare,
    ) -> None:
        norm = (queries.sizes.unsqueeze(-1) * outputs.square()).sum((-1, -2))
        self._error, self._rank, self._cost, norm = (heads.gather(x) for x in (*pairs, norm))
        self._norm, self._heads, self._keys = norm.sum(-1), heads, keys
        self._in_order: tuple[torch.Tensor, torch.Tensor] | None = None

    def of_density(self, density: float, layout: VideoLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """The selection `[B, h, Cq, Ck]` with which text, stand-ins and pairs are `density` of all pairs, and its
        estimated relative error over all heads, `[B]`.
        """
        text = layout.tokens**2 - layout.video_tokens**2
        stand_ins = self._heads.gather(self._keys.sizes > 0).sum((1, 2))
        wanted = self._rank.shape[1] * (density * layout.tokens**2 - text)
        selected = spend(self._rank, self._cost, torch.rsub(stand_ins, wanted, alpha=layout.video_tokens))
        left = self._error.masked_fill(selected, 0.0).sum((1, 2, 3))
        # Rounding leaves a little below 0 of products of covariances that are 0.
        share = left / self._norm.clamp(min=torch.finfo(torch.float32).tiny)
        return self._heads.mine(selected), share.clamp(min=0).sqrt()

    def of_error(self, relative: torch.Tensor) -> torch.Tensor:
        """The smallest selection `[B, h, Cq, Ck]` whose estimated error is at most `relative [B]`."""
        if self._in_order is None:
            _, order = self._rank.flatten(1).sort(dim=-1, descending=True, stable=True)
            # Added up from the smallest: what is left when all pairs before this one are computed. Pairs that cost
            # nothing leave nothing, and come last.
            left = running_sum(self._error.flatten(1).gather(-1, order).flip(-1)).flip(-1)
            self._in_order = order, left
        order, left = self._in_order
        keep = left > (relative.square() * self._norm).unsqueeze(-1)
        selected = torch.zeros_like(keep).scatter_(-1, order, keep).view(self._rank.shape)
        return self._heads.mine(selected & (self._rank > -torch.inf))

    def started(self, tolerance: float) -> torch.Tensor:
        """`tolerance` for each batch entry, `[B]`."""
        return torch.full_like(self._norm, tolerance)
