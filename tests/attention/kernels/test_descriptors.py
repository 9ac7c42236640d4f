"""Keys and values through tensor descriptors: the same results from every layout in memory, and no others described."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fast_set import fast
from plans import KINDS, masked_attention

pytest.importorskip("triton")

from vidaccel import SVG2, Radial, Sparge, VideoLayout
from vidaccel.attention import PlanMemory
from vidaccel.attention.kernels.block_sparse_forward import FORWARD_TILES, forward_tiles, launch_forward, results
from vidaccel.attention.kernels.descriptors import describe
from vidaccel.attention.kernels.launch import LOG2E, Tiles
from vidaccel.attention.orders import permute
from vidaccel.attention.plan import BlockPlan

TILES = Tiles(16, 32, 4, 2, tail=16, described=True)


def laid_out(layout, n, dim, device, heads=2, batch=2):
    """Random `[B, H, N, D]` with the strides of a layout."""
    if layout == "heads first":
        x = torch.randn(batch, heads, n, dim)
    elif layout == "tokens first":
        x = torch.randn(batch, n, heads, dim).transpose(1, 2)
    elif layout == "fused projection":
        x = torch.randn(batch, n, 3, heads, dim)[:, :, 1].transpose(1, 2)
    elif layout == "every other channel":
        return torch.randn(batch, heads, n, 2 * dim).to(device)[..., ::2]
    elif layout == "one token":
        return torch.randn(batch, heads, 1, dim).to(device).expand(-1, -1, n, -1)
    elif layout == "off by one":
        return torch.randn(batch * heads * n * dim + 1).to(device)[1:].view(batch, heads, n, dim)
    return x.to(device)


EVERY = list(
    itertools.product(["uniform", "ragged", "small blocks"], ["heads first", "tokens first", "fused projection"])
)
FAST = {(kind, "fused projection") for kind in KINDS} | {("uniform", layout) for _, layout in EVERY}


@pytest.mark.parametrize(("kind", "layout"), fast(FAST, EVERY))
def test_every_layout_gives_the_same_attention(device, kind, layout):
    n, dim = 101, 64
    plan, mask = KINDS[kind](n)
    plan = plan.to(device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    q, k, v = (laid_out(layout, n, dim, device).to(dtype) for _ in range(3))
    if plan.kv_order is not None:
        k, v = permute(k, plan.kv_order), permute(v, plan.kv_order)
    assert describe(k, v, TILES) is not None
    out, lse = results(q)
    out.fill_(torch.nan)
    launch_forward(q, k, v, out, lse, plan, plan.q_order, None, 0.9 * dim**-0.5 * LOG2E, TILES)
    back = torch.argsort(plan.kv_order, -1) if plan.kv_order is not None else None
    expected, sums = masked_attention(q, permute(k, back), permute(v, back), mask.to(device), 0.9 * dim**-0.5)
    tolerance = 2e-3 if dtype == torch.float16 else 3e-6
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), sums, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("layout", "dim"), [("every other channel", 64), ("off by one", 64), ("one token", 64), ("heads first", 96)]
)
def test_other_memory_is_not_described(layout, dim):
    x = laid_out(layout, 40, dim, "cpu")
    assert describe(x, x, TILES) is None


@pytest.mark.parametrize(
    ("method", "tile", "described"),
    [(Radial(decay=0.2), 128, True), (SVG2(density=0.2), 64, True), (Sparge(topk=0.3, block=(64, 64)), 64, True)],
)
def test_tiles_on_hopper_are_those_of_the_plan(monkeypatch, method, tile, described):
    """Long aligned runs take large tiles, clusters and small blocks take small ones; from the shapes alone."""
    layout = VideoLayout(8, 32, 32)
    q = torch.zeros(1, 1, layout.tokens, 64, dtype=torch.float16, device="meta")
    real = torch.randn(1, 1, layout.tokens, 64)
    plan = method.plan(real, real, real, layout, PlanMemory())
    if plan.selection is not None and plan.block is None:  # a GPU does not wait for the largest number of runs
        room = (0, (plan.selection[1].shape[-1] + 1) // 2 - plan.run_len.shape[-1])
        plan = replace(plan, run_start=F.pad(plan.run_start, room), run_len=F.pad(plan.run_len, room))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    tiles = forward_tiles(q, plan)
    assert (tiles.block_m, tiles.described) == (tile, described)
    assert tiles.num_warps == (8 if tile == 128 else 4)


def test_amd_gpus_do_not_take_the_tiles_of_hopper(monkeypatch):
    """Their numbers are their own: an MI300 is 9.4."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    q, plan = torch.zeros(1, 1, 4096, 128, dtype=torch.float16, device="meta"), BlockPlan.dense(4096, 4096)
    assert forward_tiles(q, plan).described
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert forward_tiles(q, plan) == FORWARD_TILES[0, 128, 2]


def test_what_lies_behind_the_keys_does_not_matter(device):
    """A buffer that is longer than the sequence, as a cache is, may hold anything behind it."""
    n, dim = 70, 64
    plan, mask = KINDS["uniform"](n)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    q = laid_out("heads first", n, dim, device).to(dtype)
    k, v = (torch.full((2, 2, 128, dim), torch.nan, dtype=dtype, device=device) for _ in range(2))
    k[:, :, :n], v[:, :, :n] = torch.randn(2, 2, 2, n, dim, device=device).to(dtype)
    k, v = k[:, :, :n], v[:, :, :n]
    assert describe(k, v, TILES) is not None
    out, lse = results(q)
    launch_forward(q, k, v, out, lse, plan.to(device), None, None, dim**-0.5 * LOG2E, TILES)
    expected, _ = masked_attention(q, k, v, mask.to(device))
    tolerance = 2e-3 if dtype == torch.float16 else 3e-6
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
