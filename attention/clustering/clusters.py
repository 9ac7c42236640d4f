"""What the cluster methods share: clusters of tokens, how a budget is spent on them, and the plan of a selection."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..groups import group_product, repeat_heads
from ..layout import VideoLayout
from ..own_kernels import use_kernels
from ..plan import BlockPlan
from .kmeans import chain_order, cluster_sizes, kmeans, update
from .labels import sort_labels


class Clusters(NamedTuple):
    """Tokens of each head in clusters.

    Args:
        labels: `[B, H, N]` int64, from the kernels int16 where that holds them.
        sizes: `[B, H, C]` int64; 0 is an empty cluster.
        means: `[B, H, C, D]` float32; None where they are of other tokens than those in question.
        order: `[B, H, N]` int64, the tokens sorted by cluster, where it is known: `in_order` gives it.
    """

    labels: torch.Tensor
    sizes: torch.Tensor
    means: torch.Tensor | None
    order: torch.Tensor | None = None


def in_order(clusters: Clusters) -> torch.Tensor:
    """The tokens sorted by cluster, `[B, H, N]` int64."""
    if clusters.order is not None:
        return clusters.order
    return sort_labels(clusters.labels, clusters.sizes.shape[-1])[1]


def with_order(clusters: Clusters) -> Clusters:
    """The same clusters, their tokens sorted once for all that asks for it."""
    return clusters._replace(order=in_order(clusters))


def clusters_of(labels: torch.Tensor, means: torch.Tensor) -> Clusters:
    """Clusters from labels alone, `[B, H, N]` int16 or int64; the means, `[B, H, C, D]`, are taken as they are."""
    if use_kernels(labels):
        from ..kernels.kmeans import in_clusters

        order, sizes = in_clusters(labels, means.shape[2])
        return Clusters(labels, sizes, means, order)
    labels = labels.long()
    return with_order(Clusters(labels, cluster_sizes(labels, means.shape[2]), means))


def cluster(x: torch.Tensor, count: int, iterations: int, start: torch.Tensor | None) -> Clusters:
    """k-means of `x [B, H, N, D]`, from the means of the last step, `[B, H, count, D]`, where there are any.

    New clusters are put in an order in which neighbours are alike.
    """
    found = kmeans(x.float() if x.dtype == torch.float64 else x, count, iterations, start)
    if start is not None:
        sizes = cluster_sizes(found.labels, count) if found.sizes is None else found.sizes
        return Clusters(found.labels, sizes, found.centroids, found.order)
    # Later clusters start from these means, so they keep this order at no cost.
    order = chain_order(found.centroids)
    labels = order.argsort(-1).gather(-1, found.labels.long())
    means = found.centroids.gather(2, order.unsqueeze(-1).expand(found.centroids.shape))
    return Clusters(labels, cluster_sizes(labels, count), means)


def renewed(x: torch.Tensor, clusters: Clusters) -> Clusters:
    """The same clusters with the means of other tokens, those of a later step."""
    if use_kernels(x):
        from ..kernels.kmeans import means_of

        mean = x.mean(2, keepdim=True, dtype=torch.float32)
        return clusters._replace(means=means_of(x, mean, in_order(clusters), clusters.sizes, clusters.means))
    means = update(x.float(), clusters.labels, clusters.means, clusters.sizes, clusters.order)
    return clusters._replace(means=means)


def for_heads(keys: Clusters, heads: int) -> Clusters:
    """Clusters of keys as each of `heads` query heads sees them: sizes and means `[B, H, C, ...]`.

    Labels and order, which are as long as the sequence, stay those of the key-value heads.
    """
    return keys._replace(sizes=repeat_heads(keys.sizes, heads), means=repeat_heads(keys.means, heads))


def cluster_mass(q_centroids: torch.Tensor, k_centroids: torch.Tensor, k_sizes: torch.Tensor) -> torch.Tensor:
    """Estimated softmax mass of each key cluster for each query cluster, `[B, H, Cq, Ck]`; rows sum to 1."""
    return log_mass_of_means(q_centroids, k_centroids, k_sizes).softmax(-1)


def log_mass_of_means(q_centroids: torch.Tensor, k_centroids: torch.Tensor, k_sizes: torch.Tensor) -> torch.Tensor:
    """The log of the mass of each key cluster, were all of its keys its mean, `[B, H, Cq, Ck]` float32."""
    shape = (*q_centroids.shape[:3], k_centroids.shape[2])
    q, k, sizes = (x.flatten(0, 1) for x in (q_centroids.float(), k_centroids.float(), k_sizes.log().unsqueeze(-2)))
    return torch.baddbmm(sizes, q, k.transpose(-1, -2), alpha=q.shape[-1] ** -0.5).view(shape)


def text_of(x: torch.Tensor, layout: VideoLayout) -> torch.Tensor:
    """The text's tokens of `x [B, H, N, D]`, those before the video first."""
    before, after = x[:, :, : layout.text_before], x[:, :, layout.video.stop :]
    return before if not layout.text_after else after if not layout.text_before else torch.cat([before, after], 2)


def share_of_video(q_centroids: torch.Tensor, text_k: torch.Tensor, log_mass: torch.Tensor) -> torch.Tensor:
    """Which share of what a query cluster sees is video, and not text, `[B, H, Cq, 1]`.

    Args:
        q_centroids: `[B, H, Cq, D]`. text_k: `[B, Hkv, T, D]`.
        log_mass: `[B, H, Cq, Ck]`, of the clusters of the video.
    """
    scores = group_product(q_centroids.float(), text_k.float().transpose(-1, -2)) * text_k.shape[-1] ** -0.5
    return (log_mass.logsumexp(-1, keepdim=True) - scores.logsumexp(-1, keepdim=True)).sigmoid()


def spend(rank: torch.Tensor, cost: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """Take pairs of clusters by falling rank until the budget is spent, to the nearest pair.

    There is one threshold for each batch entry, over all of its heads and rows.

    Args:
        rank: `[B, H, Cq, Ck]`; pairs of rank -inf are never taken.
        cost: the same shape, int64: numbers of pairs of tokens go beyond what float32 can add up.
        budget: `[B]`.

    Returns:
        `[B, H, Cq, Ck]` bool.
    """
    flat, order = rank.flatten(1).sort(dim=-1, descending=True, stable=True)
    price = cost.flatten(1).gather(-1, order)
    if use_kernels(cost):
        from ..kernels.spend import take

        return take(flat, order, price, budget).view(rank.shape)
    keep = (2 * price.cumsum(-1) - price <= (2 * budget).long().unsqueeze(-1)) & (flat > -torch.inf)
    return torch.zeros_like(keep).scatter_(-1, order, keep).view(rank.shape)


def rank_pairs(
    mass: torch.Tensor,
    score_spread: torch.Tensor,
    value_spread: torch.Tensor,
    away: torch.Tensor,
    q_sizes: torch.Tensor,
    k_sizes: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the stand-in of a cluster leaves of the output of a query cluster, and by what and at what price it is read.

    How the mean value moves with the query, by `value_spread`, is followed to first order (`slopes.py`), with the mass
    of the centroid: what is left is that move times what the mass of a query differs by, which is of second order. The
    mass, that of the centroid times what `spread.Spread.curve` adds, is right in the mean over the queries and not for
    each: where scores deviate as normal numbers do, its relative error has the mean square `score_spread ** 2 / 2`.

    Args:
        mass, away: `[B, H, Cq, Ck]` float32, see `probe.Seen`. score_spread, value_spread: see `spread.Spread`.
        q_sizes: `[B, H, Cq]`. k_sizes: `[B, H, Ck]`.

    Returns:
        `error`, squared, of all queries of the cluster, float32; `rank`, the log of that of a query for each key read
        beyond the stand-in, -inf where there is none; `cost`, pairs beyond the stand-ins, int64. All
        `[B, H, Cq, Ck]`. As a log, since the square of the mass that sharp heads have left is below what float32 holds,
        and so many pairs would be of one rank.
    """
    if use_kernels(k_sizes):  # of the tables the last dimension is clusters, of which there may be many
        from ..kernels import spend as kernels

        return kernels.rank_pairs(mass, score_spread, value_spread, away, q_sizes, k_sizes)
    least = torch.finfo(torch.float32).tiny
    mass = mass * (1 + 0.5 * score_spread)
    of_mass = score_spread * (value_spread + 0.5 * score_spread * away)
    rows, more = q_sizes.unsqueeze(-1), (k_sizes - 1).clamp(min=0).unsqueeze(-2)
    cost = rows * more
    rank = 2 * mass.clamp(min=least).log() + (of_mass / more.clamp(min=1)).clamp(min=least).log()
    return rows.float() * (mass.square() * of_mass), rank.masked_fill(cost == 0, -torch.inf), cost


def plan_with_text(queries: Clusters, keys: Clusters, selected: torch.Tensor, layout: VideoLayout) -> BlockPlan:
    """The plan of a selection, with the text tokens as one more cluster that is read by all and reads all.

    Args:
        queries, keys: of the video tokens; both with the sizes of each query head (`for_heads`).
        selected: `[B, H, Cq, Ck]` bool.
    """
    orders, sizes = [], []
    for clusters in (queries, keys):
        orders.append(text_last(in_order(clusters), layout))
        sizes.append(F.pad(clusters.sizes, (0, int(layout.text_tokens > 0)), value=layout.text_tokens))
    if layout.text_tokens:
        selected = F.pad(selected, (0, 1, 0, 1), value=True)
    return BlockPlan.from_clusters(sizes[0], sizes[1], selected, orders[0], orders[1])


def text_last(order: torch.Tensor, layout: VideoLayout) -> torch.Tensor:
    """An order of the video's tokens `[B, H, n]` as one of the sequence `[B, H, N]`, with the text behind the video."""
    if not layout.text_tokens:
        return order
    if use_kernels(order):
        from ..kernels.permute import text_last

        return text_last(order, layout.text_before, layout.text_after)
    text = layout.video_last_order(order.device)[: layout.text_tokens]
    return torch.cat([order + layout.text_before, text.expand(*order.shape[:2], -1)], -1)
