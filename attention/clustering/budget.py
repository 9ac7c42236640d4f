"""Which pairs of clusters a layer computes: the best of all its heads, as many as a density allows."""

from __future__ import annotations

import functools

import torch

from ..heads import HeadShare
from ..layout import VideoLayout
from .clusters import Clusters, spend


class Budget:
    """The pairs of query and key clusters of all heads of a layer.

    Args:
        pairs: squared error, rank and cost of each pair, `[B, h, Cq, Ck]` (`clusters.rank_pairs`).
        queries, keys: the clusters, both with the sizes of each query head.
        layout: where the video's tokens are. heads: which of the heads these are.
    """

    def __init__(
        self,
        pairs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        queries: Clusters,
        keys: Clusters,
        layout: VideoLayout,
        heads: HeadShare,
    ) -> None:
        self._error = pairs[0]
        self._rank, self._cost = (heads.gather(x) for x in pairs[1:])
        self._queries, self._heads, self._video = queries, heads, layout.video_tokens
        self._text = layout.tokens**2 - layout.video_tokens**2
        self._all = self._rank.shape[1] * layout.tokens**2
        self._stand_ins = heads.gather(keys.sizes > 0).sum((1, 2))
        self._sorted: tuple[torch.Tensor, torch.Tensor] | None = None

    @functools.cached_property
    def least(self) -> torch.Tensor:
        """The density of text and stand-ins alone, `[B]`."""
        return (self._rank.shape[1] * self._text + self._stand_ins * self._video).float() / self._all

    def of_density(self, density: float) -> torch.Tensor:
        """The selection `[B, h, Cq, Ck]` with which text, stand-ins and pairs are a density, to the nearest pair."""
        wanted = density * self._all - self._rank.shape[1] * self._text
        budget = torch.rsub(self._stand_ins, wanted, alpha=self._video)
        return self._heads.mine(spend(self._rank, self._cost, budget))

    def left_by(self, selected: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """The estimated error of a selection `[B, h, Cq, Ck]` over all heads, relative to the outputs of the centroids,
        `[B, h, Cq, D]`: `[B]`.
        """
        of_heads = self._error.masked_fill(selected, 0.0), self._queries.sizes.unsqueeze(-1) * outputs.square()
        left, norm = (self._heads.gather(x.sum((-1, -2))).sum(-1) for x in of_heads)
        # Rounding leaves a little below 0 of products of covariances that are 0.
        return (left / norm.clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=0).sqrt()

    def reads(self, rank: torch.Tensor, density: torch.Tensor) -> torch.Tensor:
        """Which pairs of some of the ranks, `[B, ...]`, are computed at a density `[B]`.

        By a threshold, so that pairs of one rank go together.
        """
        if self._sorted is None:
            falling, order = self._rank.flatten(1).sort(dim=-1, descending=True, stable=True)
            spent = self._cost.flatten(1).gather(-1, order).cumsum(-1).float()
            self._sorted = falling, spent / spent[:, -1:].clamp(min=1)
        falling, spent = self._sorted
        share = ((density - self.least) / (1 - self.least).clamp(min=torch.finfo(torch.float32).eps)).clamp(0, 1)
        count = torch.searchsorted(spent, share.unsqueeze(-1), right=True)
        last = falling.gather(-1, (count - 1).clamp(min=0)).masked_fill(count == 0, torch.inf)
        return (rank >= last.view(-1, *[1] * (rank.ndim - 1))) & (rank > -torch.inf)
