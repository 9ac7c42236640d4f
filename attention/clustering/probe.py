"""What the centroids of query clusters see of each key cluster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..groups import by_group, by_head
from ..orders import permute
from ..own_kernels import use_kernels
from ..rows import token_rows
from ..runs import cut_segments
from ..threads import each
from .clusters import Clusters, in_order

PIECE = 32  # keys of a cluster that are probed at once
NUMBERS = 2**25  # of each large table held at once in float32, over the heads that are worked on together
# Of each table that the CPU works on at once: 2 MiB. Pieces that fit a core's own cache are no faster alone, and on two
# threads wait for one another's turn in Python: 2**17 takes 1.3 times as long.
GROUP = 2**19
ALIKE = 0.85  # clusters that are probed together on the CPU: the size of the smallest over that of the largest


class Probe(NamedTuple):
    """What the centroid of each query cluster sees of each key cluster: its softmax over the keys, cut into clusters.

    Args:
        log_mass: `[B, H, Cq, Ck]` float32, log of the sum of the exponentials of the scaled scores; -inf without keys.
        key, value: `[B, H, Cq + r, Ck + r, D]`, means weighted by that softmax, 0 without keys; in the dtype of k where
            that is narrower than float32. The last `r` rows and columns are empty: room for the text. Strides are as
            they were best filled in.
        bias: `[B, H, Cq, Ck]` float32, the log of the mass less the scaled score of the mean key; -inf without keys.
        squares: `[B, H, Cq, Ck]` float32, of the mean value, over all channels; None where a kernel has no use for it.
    """

    log_mass: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor
    squares: torch.Tensor | None = None


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
        from ..kernels.probe import probe_clusters

        log_mass, bias, key, value = probe_clusters(q_means, k, v, in_order(keys), keys.sizes, scale, room)
        return Probe(log_mass, key, value, bias)
    batch, heads, tokens, dim = k.shape
    group, count, clusters = q_means.shape[1] // heads, q_means.shape[2], keys.sizes.shape[-1]
    # By head of k and v, with a second dimension for the query heads that share it. Key clusters come before those of
    # queries, because they are filled in cluster by cluster: rows of memory as long as possible.
    dtype = k.dtype if k.dtype.itemsize < 4 else torch.float32
    pairs = k.new_empty(batch * heads, group, clusters + room, count + room, 2 * dim, dtype=dtype)
    for rim in (pairs[:, :, clusters:], pairs[:, :, :, count:]):
        rim.zero_()
    shape = (batch * heads, group, clusters, count)
    made = _Tables(pairs, *(k.new_full(shape, fill, dtype=torch.float32) for fill in (-torch.inf, -torch.inf, 0.0)))
    order = in_order(keys)
    starts = (keys.sizes.cumsum(-1) - keys.sizes).flatten(0, 1)
    q = by_group(q_means.float(), heads).flatten(0, 1) * scale
    if on_the_host(k.device):
        _probe_by_size(q, k, v, order, starts, keys.sizes.flatten(0, 1), made)
    else:
        pairs = permute(torch.cat([k, v], -1), order).flatten(0, 1)
        first, length, owner = cut_segments(starts, keys.sizes.flatten(0, 1), tokens, PIECE)
        for some in heads_at_once(batch * heads, first.shape[-1] * group * count * dim):
            part = _Tables(*(x[some] for x in made))
            _probe_pieces(q[some], pairs[some], first[some], length[some], owner[some], part)
    pairs, *numbers = (x.flatten(0, 1).unflatten(0, (batch, heads * group)).transpose(2, 3) for x in made)
    log_mass, bias, squares = (x.contiguous() for x in numbers)
    return Probe(log_mass, pairs[..., :dim], pairs[..., dim:], bias, squares)


class _Tables(NamedTuple):
    """A probe as it is filled in, by G heads of k and v and S query heads that share each.

    Args:
        pairs: `[G, S, Ck + r, Cq + r, 2D]`, mean keys and values side by side.
        log_mass, bias, squares: `[G, S, Ck, Cq]`.
    """

    pairs: torch.Tensor
    log_mass: torch.Tensor
    bias: torch.Tensor
    squares: torch.Tensor


def on_the_host(device: torch.device) -> bool:
    """Whether sizes can be read without a wait."""
    return device.type == "cpu"


def heads_at_once(heads: int, numbers: int) -> Iterator[slice]:
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
    made: _Tables,
) -> None:
    """All heads, clusters of like size together, in float32: two batched products for each such group.

    Args:
        q: `[G, S * Cq, D]` scaled, of the S query heads that share each of the G heads of k and v.
        k, v: `[B, Hkv, N, D]`.
        order: `[B, Hkv, N]`, tokens sorted by cluster.
        starts, sizes: `[G, Ck]`.
        made: to be filled.
    """
    heads, rows, dim = q.shape
    clusters, tokens, shared, count = sizes.shape[-1], k.shape[2], made.log_mass.shape[1], made.log_mass.shape[-1]
    sources = []  # rows of k and of v, and which of them the tokens in order are
    for x in (k, v):
        of_tokens, first, step = token_rows(x)
        sources.append((of_tokens, (order * step + first).flatten()))
    first, sizes = (starts + tokens * torch.arange(heads).unsqueeze(-1)).flatten(), sizes.flatten()
    by_size = sizes.argsort()
    table = made.pairs.flatten(0, 2)[:, :count]
    numbers = [x.flatten(0, 2) for x in made[1:]]
    empty = (sizes == 0).nonzero().squeeze(-1)
    made.pairs[empty // clusters, :, empty % clusters] = 0.0

    def work(of_size: slice) -> None:
        group = by_size[of_size]
        offsets = torch.arange(int(sizes[group[-1]]))
        outside = offsets >= sizes[group].unsqueeze(-1)
        places = (first[group].unsqueeze(-1) + offsets).clamp(max=heads * tokens - 1)
        some = torch.cat([x.index_select(0, row[places.flatten()]).float() for x, row in sources], -1)
        some = some.view(*places.shape, 2 * dim)
        head, cluster = group // clusters, group % clusters
        queries = q.index_select(0, head)
        scores = queries @ some[..., :dim].transpose(1, 2)
        least = int(sizes[group[0]])  # no cluster lacks the keys before it
        scores[..., least:].masked_fill_(outside[:, least:].unsqueeze(1), -torch.inf)
        top = scores.amax(-1, keepdim=True)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        means = (weights.div_(total) @ some).to(table.dtype)
        found = _numbers((top + total.log()).squeeze(-1), queries, means)
        at = head * shared
        for s in range(shared):
            own = slice(s * count, (s + 1) * count)
            table.index_copy_(0, (at + s) * made.pairs.shape[2] + cluster, means[:, own])
            for part, x in zip(numbers, found, strict=True):
                part.index_copy_(0, (at + s) * clusters + cluster, x[:, own])

    each(work, list(_alike(sizes[by_size].tolist(), max(1, GROUP // (rows * dim)))))


def _alike(rising: list[int], most: int) -> Iterator[slice]:
    """Slices of sizes that are alike, at most so many; empty clusters are in none."""
    begin = 0
    while begin < len(rising):
        end = begin + 1
        while end < min(len(rising), begin + most) and ALIKE * rising[end] <= rising[begin]:
            end += 1
        if rising[begin]:
            yield slice(begin, end)
        begin = end


def _numbers(
    log_mass: torch.Tensor, q: torch.Tensor, means: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`log_mass [...]`, the bias and the squares, from scaled `q [..., D]` and `means [..., 2D]` as they are stored.

    As they are stored: so the stand-in is exact at the centroid. (That of the kernel is so before its keys are rounded
    to the dtype of the table.)
    """
    key, value = means.float().split(q.shape[-1], -1)
    return log_mass, log_mass - torch.linalg.vecdot(q, key), torch.linalg.vector_norm(value, dim=-1).square()


def _probe_pieces(
    q: torch.Tensor,
    pairs: torch.Tensor,
    first: torch.Tensor,
    length: torch.Tensor,
    owner: torch.Tensor,
    made: _Tables,
) -> None:
    """Some heads, without a look at the sizes. Each piece of a cluster has its own maximum: nothing overflows.

    Args:
        q: `[G, S * Cq, D]` scaled, of the S query heads that share each head of k and v.
        pairs: keys and values side by side, `[G, N, 2D]`, sorted by cluster.
        first, length, owner: `[G, P]`, pieces of clusters.
        made: to be filled.
    """
    (group, tokens, _), (shared, clusters, count) = pairs.shape, made.log_mass.shape[1:]
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
        """Sums over the pieces of each cluster, `[G, Ck, S * Cq, ...]`."""
        sums = x.new_zeros(group * clusters, *x.shape[2:]).index_add_(0, index, x.flatten(0, 1))
        return sums.view(group, clusters, *x.shape[2:])

    mass = joined(weights.sum(-1) * lift)
    means = joined((weights * lift.unsqueeze(-1)) @ some)
    means = (means / mass.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)).to(made.pairs.dtype)
    for table, x in zip(made[1:], _numbers(whole + mass.log(), q.unsqueeze(1), means), strict=True):
        table.copy_(x.unflatten(2, (shared, count)).transpose(1, 2))
    made.pairs[:, :, :clusters, :count] = means.unflatten(2, (shared, count)).transpose(1, 2)


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


def read(seen: Probe) -> Seen:
    """Some rows at a time, since the tables are large and may be in half precision."""
    bias = seen.bias.nan_to_num(neginf=0.0)
    if seen.squares is None:
        from ..kernels.probe import read_outputs

        mass, outputs, away = read_outputs(seen.log_mass, seen.value)
        return Seen(mass, bias, outputs, away)
    batch, heads, count, clusters = seen.log_mass.shape
    mass, value = seen.log_mass.softmax(-1), seen.value[:, :, :count, :clusters]
    outputs, away = mass.new_empty(batch, heads, count, value.shape[-1]), torch.empty_like(mass)

    def work(place: tuple[int, slice, slice]) -> None:
        values = value[place].float()
        out = (mass[place].unsqueeze(-2) @ values).squeeze(-2)
        product = (values @ out.unsqueeze(-1)).squeeze(-1)
        outputs[place] = out
        away[place] = (seen.squares[place] - 2 * product + out.square().sum(-1, keepdim=True)).clamp_(min=0)

    host = on_the_host(mass.device)
    rows = max(1, (GROUP if host else NUMBERS) // (clusters * value.shape[-1]))
    at_once = 1 if rows < count else max(1, rows // count)
    places = [
        (b, slice(h, h + at_once), slice(row, row + rows))
        for b in range(batch)
        for h in range(0, heads, at_once)
        for row in range(0, count, rows)
    ]
    if host:
        each(work, places)
    else:
        for place in places:
            work(place)
    return Seen(mass, bias, outputs, away)


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
    for some in heads_at_once(batch * heads, tokens * count):
        scores = k[some].float() @ q[some].transpose(-1, -2)  # [G, N, Cq]
        total = scores.logsumexp(1, keepdim=True)
        of_mean = (means[some] @ q[some].transpose(-1, -2) - total).exp()
        where = labels[some].unsqueeze(-1).expand(scores.shape)
        wrong = ((scores - total).exp() - of_mean.gather(1, where)).square()
        sums = torch.zeros_like(of_mean).scatter_add_(1, where, wrong)
        made.append(sums.transpose(1, 2))
    return by_head(torch.cat(made).unflatten(0, (batch, heads)), q_means.shape[1])
