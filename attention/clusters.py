"""What the cluster methods share: clusters of tokens, what centroids see of the keys, and how a budget is spent."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .kmeans import chain_order, cluster_sizes, kmeans, update
from .layout import VideoLayout
from .plan import BlockPlan, permute
from .runs import cut_segments

PIECE = 32  # keys of a cluster that are probed at once
PROBED = 2**25  # numbers of each table of the probe held at once, over all heads


class Clusters(NamedTuple):
    """Tokens of each head in clusters.

    Args:
        labels: `[B, H, N]` int64.
        sizes: `[B, H, C]` int64; 0 is an empty cluster.
        means: `[B, H, C, D]` float32.
    """

    labels: torch.Tensor
    sizes: torch.Tensor
    means: torch.Tensor


def cluster(x: torch.Tensor, count: int, iterations: int, start: torch.Tensor | None) -> Clusters:
    """k-means of `x [B, H, N, D]`, from the means of the last step, `[B, H, count, D]`, where there are any.

    New clusters are put in an order in which neighbours are alike.
    """
    labels, means = kmeans(x, count, iterations, start)
    if start is None:
        # Later clusters start from these means, so they keep this order at no cost.
        order = chain_order(means)
        means = means.gather(2, order.unsqueeze(-1).expand(means.shape))
        labels = order.argsort(-1).gather(-1, labels)
    return Clusters(labels, cluster_sizes(labels, count), means)


def renewed(x: torch.Tensor, clusters: Clusters) -> Clusters:
    """The same clusters with the means of other tokens, those of a later step."""
    return clusters._replace(means=update(x.float(), clusters.labels, clusters.means))


def variances(x: torch.Tensor, clusters: Clusters) -> torch.Tensor:
    """Variance of each channel within each cluster, `[B, H, C, D]`; `x` and the means in the same axes."""
    centre = x.mean(2, keepdim=True)
    squares = update((x - centre).square(), clusters.labels, torch.zeros_like(clusters.means))
    return (squares - (clusters.means - centre).square()).clamp(min=0)


class Probe(NamedTuple):
    """What the centroid of each query cluster sees of each key cluster: its softmax over the keys, cut into clusters.

    Args:
        log_mass: `[B, H, Cq, Ck]` float32, log of the sum of the exponentials of the scaled scores; -inf without keys.
        key, value: `[B, H, Cq, Ck, D]` float32, means weighted by that softmax; 0 without keys.
    """

    log_mass: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def probe(q_means: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: Clusters, scale: float) -> Probe:
    """Hold the query centroids against every key: `3 * Cq * N` products of length D a head, and no host sync.

    Args:
        q_means: `[B, H, Cq, D]`.
        k, v: `[B, H, N, D]`.
        keys: the clusters of k.
        scale: multiplies the scores.
    """
    batch, heads, tokens, dim = k.shape
    order = keys.labels.argsort(stable=True, dim=-1)
    k, v = (permute(x, order).flatten(0, 1) for x in (k, v))
    starts = keys.sizes.cumsum(-1) - keys.sizes
    first, length, owner = (x.flatten(0, 1) for x in cut_segments(starts, keys.sizes, tokens, PIECE))
    q_means = q_means.float().flatten(0, 1)
    heads_at_once = max(1, PROBED // (first.shape[-1] * q_means.shape[1] * dim))
    parts = []
    for start in range(0, batch * heads, heads_at_once):
        some = slice(start, start + heads_at_once)
        tables = (x[some] for x in (q_means * scale, k, v, first, length, owner))
        parts.append(_probe_heads(keys.sizes.shape[-1], *tables))
    log_mass, key, value = (torch.cat(x).unflatten(0, (batch, heads)) for x in zip(*parts, strict=True))
    return Probe(log_mass, key, value)


def _probe_heads(
    clusters: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: torch.Tensor,
    length: torch.Tensor,
    owner: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Some heads. Each piece of a cluster has its own maximum, so that nothing overflows.

    Args:
        clusters: Ck.
        q: `[G, Cq, D]` scaled. k, v: `[G, N, D]`, sorted by cluster.
        first, length, owner: `[G, P]`, pieces of clusters.
    """
    group, tokens, dim = k.shape
    offsets = torch.arange(PIECE, device=k.device)
    inside = offsets < length.unsqueeze(-1)  # [G, P, 32]
    rows = (first.unsqueeze(-1) + offsets).clamp(max=tokens - 1).long()
    flat = (rows + tokens * torch.arange(group, device=k.device).view(-1, 1, 1)).flatten()
    keys, values = (x.float().flatten(0, 1).index_select(0, flat).view(*rows.shape, dim) for x in (k, v))
    scores = (q.unsqueeze(1) @ keys.transpose(-1, -2)).masked_fill(~inside.unsqueeze(2), -torch.inf)  # [G, P, Cq, 32]
    top = scores.amax(-1)
    weights = (scores - top.masked_fill(top == -torch.inf, 0.0).unsqueeze(-1)).exp()
    shape = (group, clusters, q.shape[1])
    place = owner.long().unsqueeze(-1).expand(-1, -1, q.shape[1])
    whole = torch.full(shape, -torch.inf, device=k.device).scatter_reduce_(1, place, top, "amax")
    lift = (top - whole.gather(1, place).nan_to_num(neginf=0.0)).exp()  # 0 where the piece is empty
    index = (owner.long() + clusters * torch.arange(group, device=k.device).view(-1, 1)).flatten()

    def joined(x: torch.Tensor) -> torch.Tensor:
        """Sums over the pieces of each cluster, `[G, Cq, Ck, ...]`."""
        sums = x.new_zeros(group * clusters, *x.shape[2:]).index_add_(0, index, x.flatten(0, 1))
        return sums.view(group, clusters, *x.shape[2:]).transpose(1, 2)

    mass = joined(weights.sum(-1) * lift)
    weights = weights * lift.unsqueeze(-1)
    share = mass.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    log_mass = whole.transpose(1, 2) + mass.log()
    return log_mass, joined(weights @ keys) / share, joined(weights @ values) / share


def spend(rank: torch.Tensor, cost: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """Take pairs of clusters by falling rank until the budget is spent, to the nearest pair.

    There is one threshold for each batch entry, over all of its heads and rows.

    Args:
        rank: `[B, H, Cq, Ck]`; pairs of rank -inf are never taken.
        cost: the same shape.
        budget: `[B]`.

    Returns:
        `[B, H, Cq, Ck]` bool.
    """
    flat, order = rank.flatten(1).sort(dim=-1, descending=True, stable=True)
    price = cost.flatten(1).long().gather(-1, order)  # pairs of tokens: whole numbers, beyond what float32 can add up
    keep = (2 * price.cumsum(-1) - price <= (2 * budget).long().unsqueeze(-1)) & (flat > -torch.inf)
    return torch.zeros_like(keep).scatter_(-1, order, keep).view(rank.shape)


def plan_with_text(queries: Clusters, keys: Clusters, selected: torch.Tensor, layout: VideoLayout) -> BlockPlan:
    """The plan of a selection, with the text tokens as one more cluster that is read by all and reads all.

    Args:
        queries, keys: of the video tokens.
        selected: `[B, H, Cq, Ck]` bool.
    """
    orders, sizes = [], []
    for clusters in (queries, keys):
        order = clusters.labels.argsort(stable=True, dim=-1) + layout.text_before
        text = layout.video_last_order(order.device)[: layout.text_tokens]
        orders.append(torch.cat([order, text.expand(*order.shape[:2], -1)], -1))
        sizes.append(F.pad(clusters.sizes, (0, int(layout.text_tokens > 0)), value=layout.text_tokens))
    if layout.text_tokens:
        selected = F.pad(selected, (0, 1, 0, 1), value=True)
    return BlockPlan.from_clusters(sizes[0], sizes[1], selected, orders[0], orders[1])
