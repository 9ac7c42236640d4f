"""Keys and values as tensor descriptors, through which Hopper's copy engine fetches tiles from any row."""

from __future__ import annotations

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import Tiles, padded

ALIGNED = 16  # bytes, of the base and of a row


def describe(k: torch.Tensor, v: torch.Tensor, tiles: Tiles) -> tuple[tuple, tuple] | None:
    """Descriptors of k and v `[B, H, N, D]`, or None where their memory cannot be described.

    Returns:
        `((k, v, k tail, v tail), places)`: matrices of rows for tiles of `block_n` and of `tail_n` keys, and for each
        of k and v how many rows lie between batch entries and between heads, and how many columns between heads. Heads
        lie one behind the other (rows), or side by side in one row, as projections leave them (columns).
    """
    matrices = [_as_rows(x) for x in (k, v)]
    if any(matrix is None for matrix in matrices):
        return None
    dim = k.shape[-1]
    full, tail = (
        tuple(TensorDescriptor(base, list(shape), [row, 1], [keys, dim]) for base, shape, row, _ in matrices)
        for keys in (tiles.block_n, tiles.tail_n)
    )
    return (*full, *tail), tuple(number for *_, places in matrices for number in places)


def _as_rows(x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int], int, tuple[int, int, int]] | None:
    """`x [B, H, N, D]` as a matrix: memory, shape, elements from row to row, and where batch entries and heads lie."""
    batch, heads, tokens, dim = x.shape
    sb, sh, sn, sd = (stride if size > 1 else 0 for stride, size in zip(x.stride(), x.shape, strict=True))
    if tokens > 1 and sn == 0:  # one token, repeated
        return None
    sn = sn or dim
    itemsize = x.element_size()
    if dim != padded(dim) or sd != 1 or sb % sn or sn * itemsize % ALIGNED or x.data_ptr() % ALIGNED:
        return None
    if sh % sn == 0:
        rows, columns, places = (heads - 1) * (sh // sn), dim, (sb // sn, sh // sn, 0)
    elif (heads - 1) * sh + dim <= sn and sh * itemsize % ALIGNED == 0:
        rows, columns, places = 0, (heads - 1) * sh + dim, (sb // sn, 0, sh)
    else:
        return None
    return x, ((batch - 1) * places[0] + rows + tokens, columns), sn, places
