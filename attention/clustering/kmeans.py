"""Batched k-means in torch: Lloyd's iterations over every batch entry and head at once."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..own_kernels import use_kernels
from ..rows import token_rows
from ..threads import each

CHUNK = 2048  # tokens whose distances are held at once; all of them would be N x C numbers for each head
GPU_DISTANCES = 2**27  # distances held at once on a GPU, over all heads: half a GiB


class Found(NamedTuple):
    """What k-means found; `order` and `sizes` where they were made on the way.

    Args:
        labels: `[B, H, N]` int64, from the kernels int16 where that holds them.
        centroids: `[B, H, C, D]` float32, of one update more.
        order: `[B, H, N]` int64, the tokens sorted by label. sizes: `[B, H, C]` int64, tokens per label.
    """

    labels: torch.Tensor
    centroids: torch.Tensor
    order: torch.Tensor | None = None
    sizes: torch.Tensor | None = None


def kmeans(
    x: torch.Tensor,
    clusters: int,
    iterations: int,
    centroids: torch.Tensor | None = None,
    implementation: str = "auto",
) -> Found:
    """Cluster tokens by squared Euclidean distance.

    Distances are taken from tokens and centroids with the mean token removed, in float32, and without the token's own
    norm: the nearest centroid is the one with the largest `x.c - |c|^2 / 2`. That norm is the largest term and the same
    for every centroid; carried along in half precision it makes most distances equal.

    Args:
        x: `[B, H, N, D]`.
        clusters: number of clusters C, at most N.
        iterations: of assignment and update, at least 1; fewer where nothing moves any more (checked on the CPU only, a
            GPU would have to wait).
        centroids: `[B, H, C, D]` float32 to start from, those of the last step; tokens at even distances when None.
        implementation: "torch", "triton" (the same up to ties, without a float32 copy of the tokens), or "auto": triton
            on CUDA where it is installed.

    Returns:
        The labels belong to the centroids *before* their last update, and a cluster that lost all its tokens keeps its
        centroid.

    Raises:
        ValueError: more clusters than tokens, no iteration, or an unknown implementation.
    """
    if implementation not in ("auto", "torch", "triton"):
        raise ValueError(f"kmeans got implementation={implementation!r}: choose auto, torch or triton.")
    tokens = x.shape[2]
    if not 1 <= clusters <= tokens or iterations < 1:
        raise ValueError(
            f"kmeans got clusters={clusters} and iterations={iterations}: clusters must lie between 1 and the {tokens} "
            "tokens, iterations be at least 1."
        )
    mean = x.mean(2, keepdim=True, dtype=torch.float32)
    if centroids is None:
        # Even distances in a video sequence spread the first centroids over frames and places.
        picks = torch.linspace(0, tokens - 1, clusters, device=x.device).round().long()
        centroids = x[:, :, picks]
    if implementation == "triton" or (implementation == "auto" and use_kernels(x)):
        from ..kernels.kmeans import assign as nearest
        from ..kernels.kmeans import in_clusters, means_of

        for _ in range(iterations):
            labels = nearest(x, mean, centroids)
            order, sizes = in_clusters(labels, clusters)
            centroids = means_of(x, mean, order, sizes, centroids)
        return Found(labels, centroids, order, sizes)
    points, centers = x - mean, centroids - mean
    labels = assign(points, centers)
    centers = update(points, labels, centers)
    for _ in range(iterations - 1):
        previous, labels = labels, assign(points, centers)
        centers = update(points, labels, centers)
        if x.device.type == "cpu" and previous.equal(labels):
            break
    return Found(labels, centers + mean)


def chain_order(centers: torch.Tensor) -> torch.Tensor:
    """An order of `centers [B, H, C, D]` in which neighbours are alike, `[B, H, C]` int64.

    Each is followed by the nearest one that is left, beginning with the one farthest from all others. Clusters that are
    read together then lie side by side and join into fewer, longer runs. C small steps, no host sync.
    """
    distance = torch.cdist(centers, centers)
    current = distance.sum(-1).argmax(-1, keepdim=True)
    order = [current]
    for _ in range(centers.shape[2] - 1):
        column = current.unsqueeze(-2).expand(*distance.shape[:3], 1)
        distance.scatter_(-1, column, torch.inf)
        row = current.unsqueeze(-1).expand(*current.shape, distance.shape[-1])
        current = distance.gather(2, row).argmin(-1)
        order.append(current)
    return torch.cat(order, -1)


def assign(points: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """The nearest of `centers [B, H, C, D]` for each of `points [B, H, N, D]`: `[B, H, N]` int64.

    Works on some tokens at a time: all distances at once would be `N * C` numbers for each head.
    """
    half_norm = centers.square().sum(-1, keepdim=True).transpose(-1, -2) / 2
    columns = centers.transpose(-1, -2).contiguous()
    if points.device.type == "cpu":  # head by head, because a batched product is slower here
        batch, heads, tokens, _ = points.shape
        labels = torch.empty(batch, heads, tokens, dtype=torch.int64, device=points.device)

        def work(place: tuple[int, int, slice]) -> None:
            head = place[:2]
            scores = torch.addmm(half_norm[head], points[place], columns[head], beta=-1)
            labels[place] = scores.max(-1).indices  # `argmax` takes twice as long as it takes `max` to find both

        chunks = [slice(start, start + CHUNK) for start in range(0, tokens, CHUNK)]
        each(work, list(itertools.product(range(batch), range(heads), chunks)))
        return labels
    rows = max(CHUNK, GPU_DISTANCES // half_norm.numel())
    chunks = points.split(rows, dim=2)
    return torch.cat([(chunk @ columns).sub_(half_norm).max(-1).indices for chunk in chunks], 2)


def update(
    points: torch.Tensor,
    labels: torch.Tensor,
    centers: torch.Tensor,
    sizes: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean point of each cluster, the old center where there is none.

    Args:
        points: `[B, H, N, D]`. labels: `[B, H, N]`. centers: `[B, H, C, D]`.
        sizes: `[B, H, C]`, tokens per label, where they are known.
        order: `[B, H, N]`, the tokens sorted by label, where it is known. On a CPU the points are then added up two
            to four times as fast, to the same sums.
    """
    sizes = cluster_sizes(labels, centers.shape[2]) if sizes is None else sizes
    rows, first, step = token_rows(points)
    if order is not None and points.device.type == "cpu":
        sums = F.embedding_bag((order * step + first).flatten(), rows, _firsts(sizes), mode="sum")
    else:
        batch, heads, clusters, width = centers.shape
        index = labels + torch.arange(batch * heads, device=labels.device).view(batch, heads, 1) * clusters
        index = (index if step == 1 else index.transpose(1, 2)).flatten()
        sums = torch.zeros_like(centers).view(-1, width).index_add_(0, index, rows)
    counts = sizes.unsqueeze(-1)
    return torch.where(counts > 0, sums.view_as(centers) / counts.clamp(min=1), centers)


def _firsts(sizes: torch.Tensor) -> torch.Tensor:
    """Where each cluster begins among the sorted tokens of all heads, one head behind the other: `[B * H * C]`."""
    sizes = sizes.flatten()
    return sizes.cumsum(0) - sizes


def cluster_sizes(labels: torch.Tensor, clusters: int) -> torch.Tensor:
    """Tokens per cluster, `[B, H, C]` int64."""
    zeros = torch.zeros(*labels.shape[:2], clusters, dtype=torch.int64, device=labels.device)
    return zeros.scatter_add_(2, labels.long(), torch.ones_like(labels, dtype=torch.int64))
