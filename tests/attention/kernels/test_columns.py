"""Values and outputs in column parts: the same numbers as whole, in each variant of the forward kernel."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from fast_set import fast
from plans import clusters

from vidaccel.attention.backends.base import Precision
from vidaccel.attention.backends.triton import TritonBackend
from vidaccel.attention.skipped import SkippedClusters

pytest.importorskip("triton")

from vidaccel.attention.kernels import block_sparse_forward
from vidaccel.attention.kernels.columns import part_width
from vidaccel.attention.kernels.launch import Tiles


def attend(tensors, plan, precision):
    backend = TritonBackend()
    if precision is None:
        return backend.attend(*tensors, plan, 0.1, True)
    return backend.attend_quantized(*tensors, plan, 0.1, True, Precision(precision))


VARIANTS = list(itertools.product([False, True], [None, "int8"], [40, 128]))
FAST = {(False, None, 128), (False, "int8", 40), (True, None, 40), (True, "int8", 128)}


@pytest.mark.parametrize(("stand_ins", "precision", "dim"), fast(FAST, VARIANTS))
def test_parts_make_the_same_output(device, monkeypatch, stand_ins, precision, dim):
    n = 90 if device.type == "cpu" else 2000
    plan, _ = clusters(1, 2, n, n, 3, 20, share=0.4)
    tensors = [torch.randn(1, 2, n, dim).to(device, torch.float16) for _ in range(3)]
    if stand_ins:
        tables = (torch.randn(1, 2, 3, 20, dim), torch.randn(1, 2, 3, 20, dim), torch.randn(1, 2, 3, 20))
        plan = replace(plan, skipped=SkippedClusters(*tables))
    plan = plan.to(device)
    found = []
    for width in (16, 32, block_sparse_forward.padded(dim)):
        monkeypatch.setattr(block_sparse_forward, "part_width", lambda *_, width=width: width)
        found.append(attend(tensors, plan, precision))
    for out, lse in found[:-1]:
        torch.testing.assert_close(out, found[-1][0], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(lse, found[-1][1])


@pytest.mark.parametrize(
    ("major", "tiles", "itemsize", "width"),
    [
        (8, Tiles(64, 32, 4, 3), 2, 64),
        (12, Tiles(64, 32, 4, 3), 1, 64),
        (0, Tiles(128, 32, 8, 3), 2, 128),  # as many rows as columns
        (9, Tiles(64, 64, 4, 3), 2, 128),  # the products of a warp group
        (8, Tiles(32, 32, 4, 3), 2, 128),  # half of the warps would repeat what the others do
        (8, Tiles(32, 32, 2, 3), 4, 128),  # no tensor cores
    ],
)
def test_only_where_columns_would_be_dealt_to_several_warps(major, tiles, itemsize, width):
    assert part_width(major, 128, tiles, itemsize) == width
    assert part_width(major, 128, tiles, itemsize, branched=True) == (width if width == 128 and major in (8, 9) else 32)
