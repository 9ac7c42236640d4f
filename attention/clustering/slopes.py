"""How an output follows its query where clusters are skipped: to first order, by a matrix for each tile."""

from __future__ import annotations

from typing import Any

import torch

from ..groups import group_product
from ..orders import permute
from ..own_kernels import use_kernels
from ..plan import BlockPlan

ROWS = 64  # queries of a tile at a time, of at most 512 bytes each
NUMBERS = 2**26  # held at once in float32, over the heads that are worked on together


def slopes_of(share: torch.Tensor, moves: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """By what the mean value of all that a tile skips moves with its query, `[B, H, T, D, D]`, channels of q first.

    Args:
        share: `[B, H, T, C]`, of each cluster in the softmax of the tile; 0 of those that are read.
        moves: `[B, Hkv, C, D, D]`, the same of each cluster of keys (`spread.Spread.moves`).
        dtype: of the result.
    """
    dim = moves.shape[-1]
    return group_product(share.to(moves.dtype), moves.flatten(-2)).to(dtype).unflatten(-1, (dim, dim))


def follow(out: torch.Tensor, q: torch.Tensor, plan: BlockPlan) -> torch.Tensor:
    """`out + (q - centre) @ slope` of each query's tile; a gradient flows to `out` and to `q`.

    Args:
        out, q: `[B, H, n_q, D]`, not permuted.
        plan: whose `skipped` has slopes.
    """
    skipped = plan.skipped
    mean = -(-plan.n_q // plan.tile_len.shape[-1])
    most = rows_at_once(q.shape[-1], q.element_size())
    rows = min(most, 2 ** (mean - 1).bit_length())  # or short tiles would be padded to several times their length
    tables: tuple[Any, ...] = (skipped.slope, skipped.centre, *plan.cut(rows), plan.q_order)
    with torch.autocast(q.device.type, enabled=False):
        return add_slopes(out, q, *tables, rows)


def follow_in_tile(
    out: torch.Tensor, q: torch.Tensor, slope: torch.Tensor, centre: torch.Tensor | None
) -> torch.Tensor:
    """The same of the queries of one tile, where a backend has them at hand: no pass over all of them.

    Args:
        out, q: `[B, H, n, D]`. slope: `[1|B, 1|H, D, D]`. centre: `[1|B, 1|H, D]`; 0 when None.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    beyond = q.to(wide) if centre is None else q.to(wide) - centre.unsqueeze(2)
    return (out + beyond @ slope.to(wide)).to(out.dtype)


def rows_at_once(dim: int, itemsize: int) -> int:
    """Queries of a tile that are worked on together, of so many channels of so many bytes."""
    return ROWS if dim * itemsize <= 512 else ROWS // 2


@torch.library.custom_op("vidaccel::add_slopes", mutates_args=())
def add_slopes(
    out: torch.Tensor,
    x: torch.Tensor,
    slope: torch.Tensor,
    centre: torch.Tensor | None,
    start: torch.Tensor,
    length: torch.Tensor,
    tile: torch.Tensor,
    order: torch.Tensor | None,
    rows: int,
) -> torch.Tensor:
    """`out + (x - centre) @ slope`, each token with the matrix of its tile.

    Args:
        out, x: `[B, H, N, D]`, any strides.
        slope: `[B, H, S, D, D]`; tiles from number S on have none. centre: `[B, H, S, D]`; 0 when None.
        start, length, tile: `[1|B, 1|H, P]` int32, pieces of at most `rows` tokens in order (`BlockPlan.cut`).
        order: `[1|B, 1|H, N]` int64, the tokens in order; None where they are.
        rows: a power of two.

    Returns:
        `[B, H, N, D]` in the dtype and memory layout of `out`.
    """
    if use_kernels(x):
        from ..kernels import slopes

        return slopes.add_slopes(out, x, slope, centre, start, length, tile, order, rows)
    (batch, heads, tokens, dim), tiles = x.shape, slope.shape[2]
    start, length, tile = (part.expand(batch, heads, -1).long() for part in (start, length, tile))
    offsets = torch.arange(rows, device=x.device)
    inside = offsets < length.unsqueeze(-1)
    moves = (inside & (tile < tiles).unsqueeze(-1)).view(-1, rows, 1)
    inside = inside.flatten(2)
    token = (start.unsqueeze(-1) + offsets).clamp(max=tokens - 1).flatten(2)
    if order is not None:
        token = order.expand(batch, heads, -1).gather(-1, token)
    own = tile.clamp(max=tiles - 1).flatten(0, 1) + tiles * torch.arange(batch * heads, device=x.device).unsqueeze(-1)
    own, pieces = own.flatten(), own.shape[-1]
    found = permute(x, token).to(torch.promote_types(x.dtype, torch.float32)).view(-1, rows, dim)
    if centre is not None:
        found = found - centre.flatten(0, 2).index_select(0, own).unsqueeze(1)
    found = found * moves
    moved = torch.empty_like(found)
    at_once = pieces * max(1, NUMBERS // (pieces * dim * dim))
    for first in range(0, own.numel(), at_once):
        some = slice(first, first + at_once)
        torch.bmm(found[some], slope.flatten(0, 2).index_select(0, own[some]).to(found.dtype), out=moved[some])
    # In which row each token is; one more takes the padding.
    place = token.new_empty(batch, heads, tokens + 1)
    numbers = torch.arange(token.shape[-1], device=x.device)
    place.scatter_(-1, torch.where(inside, token, tokens), numbers.expand(token.shape))
    return (out + permute(moved.view(batch, heads, -1, dim), place[..., :-1])).to(out.dtype)


@add_slopes.register_fake
def _(out, *rest):
    return torch.empty_like(out)


def _save(ctx, inputs, output) -> None:
    _, _, slope, _, *pieces, ctx.rows = inputs
    ctx.save_for_backward(slope, *pieces)


def _backward(ctx, grad: torch.Tensor):
    slope, *pieces = ctx.saved_tensors
    # The slopes and centres belong to the plan, as stand-ins do.
    of_x = add_slopes(torch.zeros_like(grad), grad, slope.transpose(-1, -2), None, *pieces, ctx.rows)
    return grad, of_x, *[None] * 7


add_slopes.register_autograd(_backward, setup_context=_save)
