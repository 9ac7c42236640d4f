"""Kernels that show what a pretended GPU notices. Triton wants them in a file."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def doubled(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, 2 * tl.load(x_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def greedy(x_ptr, out_ptr, N: tl.constexpr):
    rows, columns = tl.arange(0, N)[:, None] * N, tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + rows + columns)
    tl.store(out_ptr + rows + columns, tl.dot(x, tl.dot(x, x).to(tl.float16)))
