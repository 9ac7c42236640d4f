"""The pairs that keep an output within a tolerance: the error is measured on some queries, and pairs follow it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .clusters import Clusters, in_order
from .groups import by_group, by_head, group_product
from .heads import HeadShare
from .meter import sample_rows
from .plan import permute
from .probe import probe
from .skipped import SkippedClusters

ROWS, OF_LAYER = 32, 512  # queries that are measured, the most of each head, and of many heads together
FIRST_ROUNDS, LATER_ROUNDS = 4, 2  # of correction, from nothing and from what the call before came to
AIM = 0.97  # of a tolerance, so that a round that is nearly right is on its right side
REACH, MOST = 1.5, 16.0  # how far a round goes beyond what is known, as a power of what is missing; and the most
ASKED = (1e-9, 100.0)  # bounds of what is asked of an estimate


class Measured:
    """Some queries of each head, and what each cluster of keys is to them, read and not read.

    So their output is known under any selection of clusters, at the price of a softmax over clusters.

    Args:
        q: `[B, H, N, D]` and k, v: `[B, Hkv, N, D]`, of the video.
        text: k and v of the text, `[B, Hkv, T, D]` each, which all queries read; None without text.
        queries, keys: the clusters of q and k.
        skipped: what stands for keys that are not read, without slopes.
        share: of each cluster in what a tile sees, `[B, H, Cq, Ck]`, moves: `probe.Spread.moves`, and centre:
            `[B, H, Cq, D]`, 0 when None: what slopes are made of (`slopes.py`).
        scale: multiplies the scores.
        turn: other queries for another number.
        heads: whose heads these are.
    """

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        text: tuple[torch.Tensor, torch.Tensor] | None,
        queries: Clusters,
        keys: Clusters,
        skipped: SkippedClusters,
        share: torch.Tensor,
        moves: torch.Tensor,
        centre: torch.Tensor | None,
        scale: float,
        turn: int,
        heads: HeadShare,
    ) -> None:
        batch, own, tokens, _ = q.shape
        self._heads, rows = heads, max(ROWS // 4, min(ROWS, OF_LAYER // heads.total(own)))
        count = share.shape[-1]
        # Places in the order of the clusters: each has as many of the rows as of all queries.
        token = in_order(queries).index_select(-1, sample_rows(tokens, rows, turn, q.device))
        some = permute(q, token).float()
        tile = queries.labels.long().gather(-1, token)
        whose = (torch.arange(n, device=q.device) for n in (batch, own))
        self._of_rows = (next(whose).view(-1, 1, 1), next(whose).view(-1, 1), tile)
        read = probe(some, k, v, keys, scale)
        self._read_mass, self._read_value = read.log_mass, read.value.float()
        if skipped.of_each_tile:
            key, value = (x[self._of_rows][..., :count, :].float() for x in (skipped.key, skipped.value))
            scores = (key @ some.unsqueeze(-1)).squeeze(-1)
        else:
            key, value = (x[:, :, :count].float() for x in (skipped.key, skipped.value))
            scores, value = some @ key.transpose(-1, -2), value.unsqueeze(2)
        self._skipped_mass, self._skipped_value = scores * scale + skipped.bias[self._of_rows][..., :count], value
        beyond = by_group(some if centre is None else some - centre[self._of_rows], moves.shape[1])
        moved = (beyond.unsqueeze(2).to(moves.dtype) @ moves).transpose(2, 3)
        self._moved = by_head(moved, own).float() * share[self._of_rows].unsqueeze(-1)
        self._text: tuple[torch.Tensor, torch.Tensor] | None = None
        if text is not None:
            scores = group_product(some, text[0].float().transpose(-1, -2)) * scale
            value = group_product(scores.softmax(-1), text[1].float())
            self._text = scores.logsumexp(-1, keepdim=True), value
        self._dense = self._output(torch.ones_like(self._read_mass, dtype=torch.bool))

    def error(self, selected: torch.Tensor) -> torch.Tensor:
        """Relative error of the output over all heads of the layer, `[B]`, with `selected [B, H, Cq, Ck]` clusters."""
        read = selected[self._of_rows] | self._read_mass.isneginf()  # of empty ones nothing is left out
        wrong = (self._output(read) - self._dense).square().sum((-1, -2))
        wrong, whole = (self._heads.gather(x).sum(1) for x in (wrong, self._dense.square().sum((-1, -2))))
        return (wrong / whole.clamp(min=torch.finfo(torch.float32).tiny)).sqrt()

    def _output(self, read: torch.Tensor) -> torch.Tensor:
        """`[B, H, R, D]`, of the queries when they read some clusters, `[B, H, R, Ck]`."""
        scores = torch.where(read, self._read_mass, self._skipped_mass)
        scores = scores if self._text is None else torch.cat([scores, self._text[0]], -1)
        weights = scores.softmax(-1)
        text = 0.0 if self._text is None else weights[..., -1:] * self._text[1]
        weights, read = weights[..., : read.shape[-1]].unsqueeze(-2), read.unsqueeze(-2)
        out = weights.masked_fill(~read, 0.0) @ self._read_value + weights.masked_fill(read, 0.0) @ self._skipped_value
        return (out + (~read).to(out.dtype) @ self._moved).squeeze(-2) + text


def within(
    tolerance: float,
    select: Callable[[torch.Tensor], torch.Tensor],
    error: Callable[[torch.Tensor], torch.Tensor],
    asked: torch.Tensor,
    rounds: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The smallest selection that was found whose measured error is within a tolerance; if none, the last one.

    The estimate puts pairs in a good order but is wrong by a factor, which is much the same from one step to the next.
    So what is asked of the estimate is corrected by what is measured of the selection, a few times.

    Args:
        tolerance: relative error of the output.
        select: the selection `[B, H, Cq, Ck]` whose estimated error is at most that asked for, `[B]`.
        error: of a selection, `[B]`, measured.
        asked: what is asked of the estimate at first, `[B]`.
        rounds: of correction.

    Returns:
        The selection, its error `[B]`, and what was asked of the estimate `[B]`.
    """
    # What is within, and what is beyond: what was asked for, and the error. None yet of either.
    none = torch.full_like(asked, torch.nan)
    within_it, its_error, beyond, its_own = none, none, none, none
    for _ in range(rounds):
        left = error(select(asked)).clamp(min=torch.finfo(torch.float32).tiny)
        fits = left <= tolerance
        within_it, its_error = torch.where(fits, asked, within_it), torch.where(fits, left, its_error)
        beyond, its_own = torch.where(fits, beyond, asked), torch.where(fits, its_own, left)
        # Between both as along a power; beyond one alone so far that the tolerance should lie between.
        share = (AIM * tolerance / its_error).log() / (its_own / its_error).log()
        between = within_it * (beyond / within_it) ** share.clamp(0.1, 0.9)
        further = asked * (tolerance / left).pow(REACH).clamp(1 / MOST, MOST)
        asked = torch.where(between.isnan(), further, between).clamp(*ASKED)
    left = error(select(asked))
    asked = torch.where((left > tolerance) & ~within_it.isnan(), within_it, asked)
    selected = select(asked)
    return selected, error(selected), asked
