"""Kernels that show what a pretended GPU notices. Triton wants them in a file."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def doubled(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, 2 * tl.load(x_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def greedy(x_ptr, out_ptr, N: tl.constexpr, K: tl.constexpr):
    """A product of few rows, which is soon compiled, and both of whose long operands are in shared memory at once."""
    rows, inner, columns = tl.arange(0, N)[:, None], tl.arange(0, K), tl.arange(0, N)[None, :]
    x, transposed = tl.load(x_ptr + rows * K + inner[None, :]), tl.load(x_ptr + inner[:, None] + columns * K)
    tl.store(out_ptr + rows * N + columns, tl.dot(x, transposed))
