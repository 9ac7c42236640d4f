"""How an output follows its query where clusters are skipped (`attention/slopes.py`), in one pass over the tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import FUSED, on_device, order_args, padded, plan_strides, rows_contiguous
from .walk import find_piece, load_rows, store_rows, token_rows

COLUMNS = 64  # of a matrix at a time
WIDE = 32 * 1024  # bytes of a matrix's columns above which they are halved, for GPUs with 99 KiB of shared memory
STAGES = 1  # more would hold columns several times over


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
    """`attention.slopes.add_slopes`; products in the dtype of x, sums in float32."""
    made = torch.empty_like(out)
    out, x, result = rows_contiguous(out), rows_contiguous(x), rows_contiguous(made)
    (batch, heads, _, dim), tiles, pieces = x.shape, slope.shape[2], tile.shape[-1]
    slope = slope.to(x.dtype).contiguous()
    columns = columns_of(dim, x.element_size())
    with on_device(x):
        _slopes_kernel[(pieces * batch * heads,)](
            out, *out.stride()[:3], result, *result.stride()[:3], x, *x.stride()[:3],
            slope, None if centre is None else centre.contiguous(),
            *order_args(order, heads), start.contiguous(), length.contiguous(), tile.contiguous(),
            *plan_strides(tile.shape[:2]), heads, pieces, tiles,
            D=dim, D_PAD=padded(dim), ROWS=max(16, rows), COLUMNS=columns, **FUSED, num_warps=4, num_stages=STAGES,
        )  # fmt: skip
    return made if result is made else made.copy_(result)


def columns_of(dim: int, itemsize: int) -> int:
    """Columns of a matrix that a program multiplies with at a time, for `dim` channels of so many bytes."""
    width = padded(dim)
    columns = min(COLUMNS, width)
    return columns // 2 if columns * width * itemsize > WIDE else columns


@triton.jit(do_not_specialize=["pieces", "tiles"])
def _slopes_kernel(
    out_ptr, out_sb, out_sh, out_sn, result_ptr, result_sb, result_sh, result_sn, x_ptr, x_sb, x_sh, x_sn,
    slope_ptr, centre_ptr, order_ptr, order_sb, order_sh,
    piece_start_ptr, piece_len_ptr, piece_tile_ptr, plan_sb, plan_sh, heads, pieces, tiles,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Of 0 tiles an entry: the slopes are each head's own, also where the plan is one of all heads.
    b, h, start, size, tile = find_piece(
        piece_start_ptr, piece_len_ptr, piece_tile_ptr, plan_sb, plan_sh, heads, pieces, 0
    )
    if size == 0:
        return
    inside = tl.arange(0, ROWS) < size
    rows = start + tl.arange(0, ROWS)
    if order_ptr is not None:
        rows = token_rows(order_ptr + b * order_sb + h * order_sh, rows, inside, True, True)
    d = tl.arange(0, D_PAD)
    x = load_rows(x_ptr + b * x_sb + h * x_sh, rows, x_sn, inside, d, D, D_PAD, True)
    known = d < tl.where(tile < tiles, D, 0)  # the last tiles, those of text, have no slope
    at = (b * heads + h) * tiles + tile
    if centre_ptr is not None:
        centre = tl.load(centre_ptr + at * D + d, mask=known, other=0.0)
        x = (x.to(tl.float32) - centre[None, :]).to(x.dtype)
    slope_ptr += at * D * D
    out_ptr += b * out_sb + h * out_sh
    result_ptr += b * result_sb + h * result_sh
    for first in range(0, D, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        own = known[:, None] & (column < D)[None, :]
        slope = tl.load(slope_ptr + d[:, None] * D + column[None, :], mask=own, other=0.0)
        out = load_rows(out_ptr, rows, out_sn, inside, column, D, COLUMNS, True)
        moved = tl.dot(x, slope, input_precision="ieee")
        store_rows(result_ptr, rows, result_sn, inside, column, out.to(tl.float32) + moved, D)
