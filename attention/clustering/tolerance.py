"""The pairs that keep an output within a tolerance: the error is measured on some queries, and pairs follow it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..account.meter import sample_rows
from ..groups import by_group, by_head, group_product
from ..heads import HeadShare
from ..orders import permute
from ..skipped import SkippedClusters
from .clusters import Clusters, in_order
from .probe import probe

ROWS, OF_LAYER = 32, 512  # queries that are measured, the most of each head, and of many heads together
FIRST_ROUNDS, LATER_ROUNDS = 6, 4  # of search, from nothing and from what the call before came to
AIM = 0.97  # of a tolerance, so that what is nearly right is on its right side
POWER = 1.2  # of the density, with which errors usually fall
BETWEEN = (0.1, 0.9)  # of the way, in logarithms, from a density that does not fit to one that does
LEAN = 0.3  # of the way to the other side, or one side would be approached from the other in ever smaller steps
FALL = 0.9  # of the density of the call before is kept at least
FAR = 4  # how many times too small an error no longer tells where in between


class Measured:
    """Some queries of each head, and what each cluster of keys is to them, read and not read.

    So their output is known under any selection of clusters, at the price of a softmax over clusters.

    Args:
        q: `[B, H, N, D]` and k, v: `[B, Hkv, N, D]`, of the video.
        text: k and v of the text, `[B, Hkv, T, D]` each, which all queries read; None without text.
        queries, keys: the clusters of q and k.
        skipped: what stands for keys that are not read, without slopes.
        share: of each cluster in what a tile sees, `[B, H, Cq, Ck]`, moves: `spread.Spread.moves`, and centre:
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
        self._whole = self._over_layer(self._dense).clamp(min=torch.finfo(torch.float32).tiny)

    def of_tiles(self, x: torch.Tensor) -> torch.Tensor:
        """Of a table `[B, H, Cq, Ck]` the row of each query's tile, `[B, H, R, Ck]`."""
        return x[self._of_rows]

    def error(self, read: torch.Tensor) -> torch.Tensor:
        """Relative error of the output over all heads of the layer, `[B]`, with the clusters that are read by each
        query, `[B, H, R, Ck]`.
        """
        read = read | self._read_mass.isneginf()  # of empty ones nothing is left out
        return (self._over_layer(self._output(read) - self._dense) / self._whole).sqrt()

    def _over_layer(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of squares of `[B, H, R, D]` over all heads of the layer, `[B]`."""
        return self._heads.gather(x.square().sum((-1, -2))).sum(1)

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
    error: Callable[[torch.Tensor], torch.Tensor],
    least: torch.Tensor,
    before: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest density that was found whose measured error is within a tolerance.

    Errors fall about as a power of the density. So what is tried next lies between one that fits and one that does not,
    as along a power, and beyond one that does not fit as far as a usual power says, and further from round to round.

    Args:
        tolerance: relative error of the output, above 0.
        error: of a density, `[B]`, measured; 0 of density 1.
        least: the density of what stands in alone, `[B]`.
        before: what was found of the call before, `[B]`; None at the first.

    Returns:
        The density, at least `least` and 1 where no other fits, and its error, both `[B]`.
    """
    aim, tiny = AIM * tolerance, torch.finfo(torch.float32).tiny
    least_error = error(least)
    low, low_error = least, least_error.clamp(min=tiny)
    alone = low_error <= tolerance
    high, high_error = torch.ones_like(least), torch.zeros_like(least)
    tried = _beyond(low, low_error, aim, 1)
    if before is not None:  # where stand-ins were enough, or an output was no number, it says nothing
        tried = torch.where((before > least) & (before < 1), before, tried)
    for turn in range(FIRST_ROUNDS if before is None else LATER_ROUNDS):
        found = error(tried)
        fits = found <= tolerance
        high, high_error = torch.where(fits, tried, high), torch.where(fits, found, high_error)
        low, low_error = torch.where(fits, low, tried), torch.where(fits, low_error, found)
        share = (low_error / aim).log() / (low_error / high_error.clamp(min=tiny)).log()
        share = share.clamp(*BETWEEN)
        share = torch.where(fits, (1 - LEAN) * share, share + LEAN * (1 - share))
        between = low * (high / low) ** torch.where(high_error < aim / FAR, 0.5, share)
        tried = torch.where(high < 1, between, _beyond(low, low_error, aim, turn + 2))
    density = torch.where(alone, least, high)
    return density, torch.where(alone, least_error, high_error)


def falling_slowly(
    density: torch.Tensor, found: torch.Tensor, error: Callable[[torch.Tensor], torch.Tensor], before: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """At least nine tenths of the density of the call before, unless that was 1, where nothing else fitted.

    Where attention is sharp, few queries have most of the error, and those that are measured may have none of it: the
    lowest density that fits them is too low. But each call measures other queries.

    Args:
        density, found: of `within`, with its error. error: as there. before: of the call before, `[B]`.

    Returns:
        The density and its error, both `[B]`.
    """
    kept = torch.where(before < 1, torch.maximum(FALL * before, density), density)
    return kept, torch.where(kept > density, error(kept), found)


def _beyond(density: torch.Tensor, error: torch.Tensor, aim: float, reach: int) -> torch.Tensor:
    """Where an error should be what is aimed at, or so far beyond; below 1, in logarithms."""
    further = (error / aim).clamp(min=1.0).log() * reach / POWER
    return density * torch.minimum(further, -density.log() * BETWEEN[1]).exp()
