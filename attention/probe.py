"""What the centroids of query clusters see of each key cluster, and what a first-order stand-in for it leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .clusters import Clusters, in_order, with_order
from .groups import by_group, by_head, group_product
from .own_kernels import use_kernels
from .plan import permute
from .runs import cut_segments

PIECE = 32  # keys of a cluster that are probed at once
# Tokens of a cluster that its covariance is estimated from. On the demo model's heads and on imitated ones, 16 to 256
# give the same error of a call within 1 %.
SAMPLE = 32
NUMBERS = 2**25  # of each large table held at once in float32, over the heads that are worked on together
ALIKE = 0.85  # clusters that are probed together on the CPU: the size of the smallest over that of the largest


class Probe(NamedTuple):
    """What the centroid of each query cluster sees of each key cluster: its softmax over the keys, cut into clusters.

    Args:
        log_mass: `[B, H, Cq, Ck]` float32, log of the sum of the exponentials of the scaled scores; -inf without keys.
        key, value: `[B, H, Cq + r, Ck + r, D]`, means weighted by that softmax, 0 without keys; in the dtype of k where
            that is narrower than float32. The last `r` rows and columns are empty: room for the text.
        bias: `[B, H, Cq, Ck]` float32, the log of the mass less the scaled score of the mean key, where that is known.
    """

    log_mass: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None = None


def probe(
    q_means: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: Clusters, scale: float, room: int = 0
) -> Probe:
    """Hold the query centroids against every key: `3 * Cq * N` products of length D a head, and no sync on a GPU.

    Args:
        q_means: `[B, H, Cq, D]`.
        k, v: `[B, Hkv, N, D]`, H a multiple of Hkv.
        keys: the clusters of k.
        scale: multiplies the scores.
        room: empty rows and columns behind those of the clusters.
    """
    if use_kernels(k):
        from .kernels.probe import probe_clusters

        log_mass, bias, key, value = probe_clusters(q_means, k, v, in_order(keys), keys.sizes, scale, room)
        return Probe(log_mass, key, value, bias)
    batch, heads, tokens, dim = k.shape
    group, count, clusters = q_means.shape[1] // heads, q_means.shape[2], keys.sizes.shape[-1]
    dtype = k.dtype if k.dtype.itemsize < 4 else torch.float32
    # By head of k and v, with a second dimension for the query heads that share it.
    lead = (batch * heads, group)
    log_mass = k.new_full((*lead, count, clusters), -torch.inf, dtype=torch.float32)
    key, value = (k.new_zeros(*lead, count + room, clusters + room, dim, dtype=dtype) for _ in range(2))
    order = in_order(keys)
    starts = (keys.sizes.cumsum(-1) - keys.sizes).flatten(0, 1)
    q = by_group(q_means.float(), heads).flatten(0, 1) * scale
    made = Probe(log_mass, key[:, :, :count, :clusters], value[:, :, :count, :clusters])
    if on_the_host(k.device):
        flat = [x.flatten(0, 1) for x in (k, v, order, keys.sizes)]
        _probe_by_size(q, flat[0], flat[1], flat[2], starts, flat[3], made)
    else:
        pairs = permute(torch.cat([k, v], -1), order).flatten(0, 1)
        first, length, owner = cut_segments(starts, keys.sizes.flatten(0, 1), tokens, PIECE)
        for some in _heads_at_once(batch * heads, first.shape[-1] * group * count * dim):
            part = Probe(log_mass[some], made.key[some], made.value[some])
            _probe_pieces(q[some], pairs[some], first[some], length[some], owner[some], part)
    return Probe(*(x.flatten(0, 1).unflatten(0, (batch, heads * group)) for x in (log_mass, key, value)))


def on_the_host(device: torch.device) -> bool:
    """Whether sizes can be read without a wait."""
    return device.type == "cpu"


def _heads_at_once(heads: int, numbers: int) -> Iterator[slice]:
    """Slices of heads whose tables, of so many numbers a head, stay within `NUMBERS`."""
    step = max(1, NUMBERS // max(1, numbers))
    return (slice(start, start + step) for start in range(0, heads, step))


def _probe_by_size(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    sizes: torch.Tensor,
    made: Probe,
) -> None:
    """All heads, clusters of like size together, in float32: three batched products for each such group.

    Args:
        q: `[G, S * Cq, D]` scaled, of the S query heads that share each head of k and v, `[G, N, D]`.
        order: `[G, N]`, tokens sorted by cluster.
        starts, sizes: `[G, Ck]`.
        made: tables `[G, S, Cq, Ck, ...]` to be filled.
    """
    heads, count, dim = q.shape
    shared = made.log_mass.shape[1:3]
    clusters, tokens = sizes.shape[-1], k.shape[1]
    token = (order + tokens * torch.arange(heads).unsqueeze(-1)).flatten()
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    first = (starts + tokens * torch.arange(heads).unsqueeze(-1)).flatten()
    by_size = sizes.flatten().argsort()
    rising = sizes.flatten()[by_size].tolist()
    begin = 0
    while begin < len(rising):
        end = begin + 1
        while (
            end < len(rising) and ALIKE * rising[end] <= rising[begin] and (end - begin) * count * dim < NUMBERS // 16
        ):
            end += 1
        group, longest = by_size[begin:end], rising[end - 1]
        begin = end
        if not longest:
            continue
        offsets = torch.arange(longest)
        outside = offsets >= sizes.flatten()[group].unsqueeze(-1)
        rows = (first[group].unsqueeze(-1) + offsets).clamp(max=heads * tokens - 1)
        keys, values = (x.index_select(0, token[rows.flatten()]).float().view(*rows.shape, dim) for x in (k, v))
        head, cluster = group // clusters, group % clusters
        scores = torch.baddbmm(
            keys.new_zeros(rows.shape).masked_fill_(outside, -torch.inf).unsqueeze(1),
            q.index_select(0, head),
            keys.transpose(1, 2),
        )
        top = scores.amax(-1, keepdim=True)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        weights.div_(total)
        made.log_mass[head, :, :, cluster] = (top + total.log()).squeeze(-1).unflatten(1, shared)
        for table, x in zip(made[1:3], (keys, values), strict=True):
            table[head, :, :, cluster] = (weights @ x).to(table.dtype).unflatten(1, shared)


def _probe_pieces(
    q: torch.Tensor,
    pairs: torch.Tensor,
    first: torch.Tensor,
    length: torch.Tensor,
    owner: torch.Tensor,
    made: Probe,
) -> None:
    """Some heads, without a look at the sizes. Each piece of a cluster has its own maximum: nothing overflows.

    Args:
        q: `[G, S * Cq, D]` scaled, of the S query heads that share each head of k and v.
        pairs: keys and values side by side, `[G, N, 2D]`, sorted by cluster.
        first, length, owner: `[G, P]`, pieces of clusters.
        made: tables `[G, S, Cq, Ck, ...]` to be filled.
    """
    (group, tokens, _), clusters = pairs.shape, made.log_mass.shape[-1]
    offsets = torch.arange(PIECE, device=q.device)
    inside = offsets < length.unsqueeze(-1)  # [G, P, 32]
    rows = (first.unsqueeze(-1) + offsets).clamp(max=tokens - 1).long()
    flat = (rows + tokens * torch.arange(group, device=q.device).view(-1, 1, 1)).flatten()
    some = pairs.flatten(0, 1).index_select(0, flat).view(*rows.shape, -1).float()
    scores = (q.unsqueeze(1) @ some[..., : q.shape[-1]].transpose(-1, -2)).masked_fill(
        ~inside.unsqueeze(2), -torch.inf
    )  # [G, P, Cq, 32]
    top = scores.amax(-1)
    weights = (scores - top.masked_fill(top == -torch.inf, 0.0).unsqueeze(-1)).exp()
    shape = (group, clusters, q.shape[1])
    place = owner.long().unsqueeze(-1).expand(-1, -1, q.shape[1])
    whole = torch.full(shape, -torch.inf, device=q.device).scatter_reduce_(1, place, top, "amax")
    lift = (top - whole.gather(1, place).nan_to_num(neginf=0.0)).exp()  # 0 where the piece is empty
    index = (owner.long() + clusters * torch.arange(group, device=q.device).view(-1, 1)).flatten()

    def joined(x: torch.Tensor) -> torch.Tensor:
        """Sums over the pieces of each cluster, `[G, S * Cq, Ck, ...]`."""
        sums = x.new_zeros(group * clusters, *x.shape[2:]).index_add_(0, index, x.flatten(0, 1))
        return sums.view(group, clusters, *x.shape[2:]).transpose(1, 2)

    mass = joined(weights.sum(-1) * lift)
    means = joined((weights * lift.unsqueeze(-1)) @ some)
    means = means / mass.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    shared = made.log_mass.shape[1:3]
    made.log_mass.copy_((whole.transpose(1, 2) + mass.log()).unflatten(1, shared))
    for table, part in zip(made[1:3], means.split(q.shape[-1], -1), strict=True):
        table.copy_(part.unflatten(1, shared))


class Seen(NamedTuple):
    """What is read off a probe, float32.

    Args:
        mass: `[B, H, Cq, Ck]`, share of each centroid's softmax.
        bias: the same shape, of the stand-in: `bias + scale * q . key` is the log of the mass, to first order in q.
        outputs: `[B, H, Cq, D]`, of the centroids.
        away: `[B, H, Cq, Ck]`, squared distance of each cluster's value from the centroid's output.
    """

    mass: torch.Tensor
    bias: torch.Tensor
    outputs: torch.Tensor
    away: torch.Tensor


def read(seen: Probe, q_means: torch.Tensor, scale: float) -> Seen:
    """A few heads at a time, since the tables are large and may be in half precision."""
    if seen.bias is not None:
        from .kernels.probe import read_outputs

        mass, outputs, away = read_outputs(seen.log_mass, seen.value)
        return Seen(mass, seen.bias.nan_to_num(neginf=0.0), outputs, away)
    batch, heads, count, clusters = seen.log_mass.shape
    mass = seen.log_mass.softmax(-1)
    bias, away, outputs = torch.empty_like(mass), torch.empty_like(mass), torch.empty_like(q_means)
    key, value = (x[:, :, :count, :clusters] for x in (seen.key, seen.value))
    for some in _heads_at_once(heads, batch * count * clusters * q_means.shape[-1]):
        # The keys as they are stored: so the stand-in is exact at the centroid. (That of the kernel is so for the
        # centroid rounded to the dtype of the keys.)
        at_centroid = (key[:, some].float() @ q_means[:, some].unsqueeze(-1)).squeeze(-1)
        bias[:, some] = seen.log_mass[:, some] - scale * at_centroid
        values = value[:, some].float()
        outputs[:, some] = (mass[:, some].unsqueeze(-2) @ values).squeeze(-2)
        away[:, some] = (values - outputs[:, some].unsqueeze(-2)).square_().sum(-1)
    return Seen(mass, bias.nan_to_num(neginf=0.0), outputs, away)


def score_variance(
    q: torch.Tensor, k: torch.Tensor, queries: Clusters, keys: Clusters, scale: float, from_zero: bool = False
) -> torch.Tensor:
    """Mean square of the scaled score between what a query and a key have beyond their centroids, `[B, H, Cq, Ck]`.

    That is the trace of the product of both covariances, which needs no axes, and so no eigenvectors, whose solver
    waits for the GPU. Covariances are estimated from `SAMPLE` tokens of each cluster.

    Args:
        q: `[B, H, N, D]`. k: `[B, Hkv, N, D]`. queries, keys: their clusters.
        from_zero: of the whole query instead, not less its centroid.
    """
    batch, heads, _, dim = q.shape
    group = heads // k.shape[1]
    low = torch.bfloat16 if q.is_cuda and q.dtype.itemsize < 4 else torch.float32
    spread = torch.empty(batch, heads, queries.sizes.shape[-1], keys.sizes.shape[-1], device=q.device)
    most = max(group * queries.sizes.shape[-1], keys.sizes.shape[-1]) * max(SAMPLE, dim) * dim
    # In 16 bits on a GPU, where a launch for every few heads would cost more than the memory.
    for some in _heads_at_once(k.shape[1], batch * most // (8 if q.is_cuda else 1)):
        readers = slice(group * some.start, group * some.stop)
        of_q, of_k = (
            _covariances(x[:, own], Clusters(*(part[:, own] for part in with_order(clusters))), low)
            for x, clusters, own in ((q, queries, readers), (k, keys, some))
        )
        if from_zero:
            means = queries.means[:, readers]
            of_q = of_q + (means.unsqueeze(-1) * means.unsqueeze(-2)).to(low)
        spread[:, readers] = group_product(of_q.flatten(-2), of_k.flatten(-2).transpose(-1, -2)).float()
    return spread.mul_(scale**2).clamp_(min=0)


def _covariances(x: torch.Tensor, clusters: Clusters, dtype: torch.dtype) -> torch.Tensor:
    """`[B, H, C, D, D]` of tokens `[B, H, N, D]` about the means of their clusters, from tokens spread over each."""
    some = deviations(x, clusters, dtype)
    return some.transpose(-1, -2) @ some


def deviations(x: torch.Tensor, clusters: Clusters, dtype: torch.dtype) -> torch.Tensor:
    """What `SAMPLE` tokens spread over each cluster have beyond its mean, over the square root of their number.

    `[B, H, C, SAMPLE, D]`, 0 where a cluster has fewer tokens: the product over tokens is the covariance.
    """
    order = in_order(clusters)
    if use_kernels(x):
        from .kernels import sample

        return sample.deviations(x, order, clusters.sizes, clusters.means, SAMPLE, dtype)
    sizes = clusters.sizes.unsqueeze(-1)
    count = sizes.clamp(max=SAMPLE)
    place = torch.arange(SAMPLE, device=x.device)
    inside = place < count
    rows = (sizes.cumsum(2) - sizes) + torch.where(inside, place * sizes // count.clamp(min=1), 0)
    rows = rows.flatten(2).clamp(max=x.shape[2] - 1)
    some = permute(x, order.gather(-1, rows)).float().unflatten(2, inside.shape[2:]) - clusters.means.unsqueeze(3)
    # The weight of the mean is that of the sample, not of n - 1: the centre is that of the whole cluster.
    return (some * (inside / count.clamp(min=1).sqrt()).unsqueeze(-1)).to(dtype)


def map_error(q_means: torch.Tensor, k: torch.Tensor, keys: Clusters, scale: float) -> torch.Tensor:
    """By how much the mean key of each cluster gets a centroid's attention wrong: `[B, H, Cq, Ck]` float32.

    The sum over the keys of a cluster of `(weight - weight of the mean key)^2`, weights being softmax over all keys.

    Args:
        q_means: `[B, H, Cq, D]`. k: `[B, Hkv, N, D]`. keys: its clusters.
    """
    batch, heads, tokens, _ = k.shape
    q = by_group(q_means.float() * scale, heads)
    count = q.shape[2]
    made = []
    q, k, labels, means = (x.flatten(0, 1) for x in (q, k, keys.labels.long(), keys.means))
    for some in _heads_at_once(batch * heads, tokens * count):
        scores = k[some].float() @ q[some].transpose(-1, -2)  # [G, N, Cq]
        total = scores.logsumexp(1, keepdim=True)
        of_mean = (means[some] @ q[some].transpose(-1, -2) - total).exp()
        where = labels[some].unsqueeze(-1).expand(scores.shape)
        wrong = ((scores - total).exp() - of_mean.gather(1, where)).square()
        sums = torch.zeros_like(of_mean).scatter_add_(1, where, wrong)
        made.append(sums.transpose(1, 2))
    return by_head(torch.cat(made).unflatten(0, (batch, heads)), q_means.shape[1])
