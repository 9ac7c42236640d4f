"""How a budget is spent on pairs of clusters (`attention/clusters.py`), and what they are ranked by, in one pass each.

In torch either is a dozen operators over one number for every pair of clusters of every head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import FUSED, on_device

BLOCK = 1024  # pairs a program, and at a time
LEAST = tl.constexpr(torch.finfo(torch.float32).tiny)


def rank_pairs(
    mass: torch.Tensor,
    score_spread: torch.Tensor,
    value_spread: torch.Tensor,
    away: torch.Tensor,
    q_sizes: torch.Tensor,
    k_sizes: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`clusters.rank_pairs` in one pass; the tables are float32."""
    tables = [x.contiguous() for x in (mass, score_spread, value_spread, away, q_sizes.long(), k_sizes.long())]
    error, rank = torch.empty_like(tables[0]), torch.empty_like(tables[0])
    cost = torch.empty(mass.shape, dtype=torch.int64, device=mass.device)
    count, clusters = mass.shape[-2:]
    with on_device(mass):
        _rank_kernel[(cost[..., 0].numel(),)](
            *tables, error, rank, cost, count, clusters,
            BLOCK=min(BLOCK, triton.next_power_of_2(clusters)), **FUSED, num_warps=4,
        )  # fmt: skip
    return error, rank, cost


def take(flat: torch.Tensor, order: torch.Tensor, price: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """Pairs taken by falling rank until the budget is spent, to the nearest pair: `[B, M]` bool.

    Args:
        flat, order: `[B, M]`, ranks in falling order, and of which pair each is.
        price: `[B, M]` int64, in the same order. budget: `[B]`.
    """
    taken = torch.empty(flat.shape, dtype=torch.int8, device=flat.device)
    total = price.cumsum(-1)
    with on_device(flat):
        _take_kernel[(triton.cdiv(flat.shape[-1], BLOCK), flat.shape[0])](
            flat, order, price, total, budget.float().contiguous(), taken, flat.shape[-1],
            BLOCK=BLOCK, **FUSED, num_warps=4,
        )  # fmt: skip
    return taken.view(torch.bool)


@triton.jit(do_not_specialize=["count", "clusters"])
def _rank_kernel(
    mass_ptr, score_spread_ptr, value_spread_ptr, away_ptr, q_size_ptr, k_size_ptr, error_ptr, rank_ptr, cost_ptr,
    count, clusters, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    queries = tl.load(q_size_ptr + row)
    of_keys = (row // count) * clusters
    for first in range(0, clusters, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < clusters
        here = row * clusters + at
        mass = tl.load(mass_ptr + here, mask=inside, other=0.0)
        score_spread = tl.load(score_spread_ptr + here, mask=inside, other=0.0)
        value_spread = tl.load(value_spread_ptr + here, mask=inside, other=0.0)
        away = tl.load(away_ptr + here, mask=inside, other=0.0)
        more = tl.maximum(tl.load(k_size_ptr + of_keys + at, mask=inside, other=0) - 1, 0)
        mass *= 1 + 0.5 * score_spread
        of_mass = score_spread * (value_spread + 0.5 * score_spread * away)
        of_key = of_mass / tl.maximum(more, 1).to(tl.float32)
        cost = queries * more
        rank = 2 * tl.log(tl.maximum(mass, LEAST)) + tl.log(tl.maximum(of_key, LEAST))
        rank = tl.where(cost == 0, float("-inf"), rank)
        tl.store(error_ptr + here, queries.to(tl.float32) * (mass * mass * of_mass), mask=inside)
        tl.store(rank_ptr + here, rank, mask=inside)
        tl.store(cost_ptr + here, cost, mask=inside)


@triton.jit(do_not_specialize=["pairs"])
def _take_kernel(
    flat_ptr, order_ptr, price_ptr, total_ptr, budget_ptr, taken_ptr, pairs, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < pairs
    here = row * pairs + at
    most = (2 * tl.load(budget_ptr + row)).to(tl.int64)
    price = tl.load(price_ptr + here, mask=inside, other=0)
    total = tl.load(total_ptr + here, mask=inside, other=0)
    keep = (2 * total - price <= most) & (tl.load(flat_ptr + here, mask=inside, other=0.0) > float("-inf"))
    place = tl.load(order_ptr + here, mask=inside, other=0)
    tl.store(taken_ptr + row * pairs + place, keep.to(tl.int8), mask=inside)
