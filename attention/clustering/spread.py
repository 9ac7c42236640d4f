"""What the queries of a cluster make of a key cluster beyond what their centroid makes of it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..groups import group_product
from ..orders import permute
from ..own_kernels import use_kernels
from .clusters import Clusters, in_order, with_order
from .probe import heads_at_once

# Tokens of a cluster that its covariances are estimated from. Of clusters of 51 tokens on average (the demo model at
# 8,448) 32 leave a tenth more error of a call; 128 and 256 leave what 64 do, within 2 %, on imitated heads too.
SAMPLE = 64


class Spread(NamedTuple):
    """What queries make of a cluster of keys beyond what their centroid makes of it.

    Args:
        score: `[B, H, Cq, Ck]` float32, mean square of the scaled score between what a query and a key have beyond
            their centroids.
        value: the same shape, mean square, over the queries and added up over the channels, of what the mean value of
            the keys moves by from the centroid to a query, to first order: the covariance of values and scores.
        moves: `[B, Hkv, Ck, D, D]`, of each cluster of keys: `(q - centroid) @ moves` is that move. It is the
            covariance of its keys and values, scaled as scores are; in the dtype that it is estimated in.
    """

    score: torch.Tensor
    value: torch.Tensor
    moves: torch.Tensor

    @property
    def curve(self) -> torch.Tensor:
        """What the log of a mass lacks that was expanded to first order at the centroid, so that the mass is right in
        the mean over the queries.

        The mean of an exponential is to second order 1 and half of the exponent's mean square. As a logarithm, which
        grows slowly where that is large and the expansion says little.
        """
        return (0.5 * self.score).log1p()


def spread_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: Clusters,
    keys: Clusters,
    scale: float,
    from_zero: bool = False,
) -> Spread:
    """Squares as traces of products of covariances, which need no axes, and so no eigenvectors, whose solver waits for
    the GPU. Covariances are estimated from `SAMPLE` tokens of each cluster.

    Args:
        q: `[B, H, N, D]`. k, v: `[B, Hkv, N, D]`. queries, keys: the clusters of q and k.
        from_zero: of the whole query instead, not less its centroid.
    """
    batch, heads, _, dim = q.shape
    group = heads // k.shape[1]
    low = torch.bfloat16 if q.is_cuda and q.dtype.itemsize < 4 else torch.float32
    scores: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    moves: list[torch.Tensor] = []
    most = max(group * queries.sizes.shape[-1], keys.sizes.shape[-1]) * max(SAMPLE, dim) * dim
    queries, keys = with_order(queries), with_order(keys)
    # In 16 bits on a GPU, where a launch for every few heads would cost more than the memory.
    for some in heads_at_once(k.shape[1], batch * most // (8 if q.is_cuda else 1)):
        readers = slice(group * some.start, group * some.stop)
        own_q, own_k = (
            Clusters(*(part[:, own] for part in clusters)) for clusters, own in ((queries, readers), (keys, some))
        )
        of_q, of_k = deviations(q[:, readers], own_q, low), deviations(k[:, some], own_k, low)
        of_v = deviations(v[:, some], own_k._replace(means=None), low)
        if from_zero:  # the mean of squares is the variance and the square of the mean
            of_q = torch.cat([of_q, own_q.means.unsqueeze(3).to(low)], 3)
        of_q = (of_q.transpose(-1, -2) @ of_q).flatten(-2)
        of_keys = of_k.new_empty(*of_k.shape[:3], dim, dim)  # once: new memory costs a CPU more than a product
        # With the covariance of keys and values `c`, `c c^T` is that of the keys between which lie products of values.
        moves.append(_product(of_k.transpose(-1, -2), of_v, scale, torch.empty_like(of_keys)))
        for found, seen, factor in ((scores, of_k.transpose(-1, -2), scale**2), (values, moves[-1], 1.0)):
            _product(seen, seen.transpose(-1, -2), factor, of_keys)
            found.append(group_product(of_q, of_keys.flatten(-2).transpose(-1, -2)).float())
    return Spread(*(parts[0] if len(parts) == 1 else torch.cat(parts, 1) for parts in (scores, values, moves)))


def _product(x: torch.Tensor, y: torch.Tensor, factor: float, out: torch.Tensor) -> torch.Tensor:
    """`factor * x @ y` of `x [B, H, C, R, K]` and `y [B, H, C, K, M]`, in one launch, into a contiguous `out`."""
    flat = out.flatten(0, 2)
    torch.baddbmm(flat, x.flatten(0, 2), y.flatten(0, 2), beta=0, alpha=factor, out=flat)
    return out


def deviations(x: torch.Tensor, clusters: Clusters, dtype: torch.dtype) -> torch.Tensor:
    """What `SAMPLE` tokens spread over each cluster have beyond its mean, over the square root of their number.

    `[B, H, C, SAMPLE, D]`, 0 where a cluster has fewer tokens: the product over tokens is the covariance. The mean is
    that of the sample where the clusters have none.
    """
    order = in_order(clusters)
    if use_kernels(x):
        from ..kernels import sample

        return sample.deviations(x, order, clusters.sizes, clusters.means, SAMPLE, dtype)
    sizes = clusters.sizes.unsqueeze(-1)
    count = sizes.clamp(max=SAMPLE)
    place = torch.arange(SAMPLE, device=x.device)
    inside = place < count
    rows = (sizes.cumsum(2) - sizes) + torch.where(inside, place * sizes // count.clamp(min=1), 0)
    rows = rows.flatten(2).clamp(max=x.shape[2] - 1)
    some = permute(x, order.gather(-1, rows)).float().unflatten(2, inside.shape[2:])
    # The weight of the mean is that of the sample, not of n - 1: the centre is that of the whole cluster, mostly.
    weights = (inside / count.clamp(min=1).sqrt()).unsqueeze(-1)
    means = weights.square().transpose(-1, -2) @ some if clusters.means is None else clusters.means.unsqueeze(3)
    return some.sub_(means).mul_(weights).to(dtype)
