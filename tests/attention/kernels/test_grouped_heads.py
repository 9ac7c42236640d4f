"""The kernels where query heads share heads of k and v: against the definition with k and v repeated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plans import clusters, masked_attention, uniform

from vidaccel import Tangent, VideoLayout, sparse_attention
from vidaccel.attention import PlanMemory
from vidaccel.attention.backends.base import Precision
from vidaccel.attention.backends.triton import TritonBackend
from vidaccel.attention.orders import permute
from vidaccel.attention.skipped import SkippedClusters

pytest.importorskip("triton")

from vidaccel.attention.kernels import block_sparse, block_sparse_backward, profile, quantize
from vidaccel.attention.kernels.block_sparse_forward import launch_forward, results
from vidaccel.attention.kernels.block_sparse_int8 import int8_tiles
from vidaccel.attention.kernels.launch import LOG2E, Tiles
from vidaccel.attention.kernels.permute import permute_rows
from vidaccel.attention.kernels.probe import probe_clusters
from vidaccel.attention.kernels.quantize_reference import int8_attention

HEADS, KV_HEADS, DIM = 4, 2, 64
DESCRIBED = Tiles(16, 32, 4, 2, tail=16, described=True)
PLANS = {
    "uniform": lambda n: uniform(1, HEADS, n, n, 16, 16),
    "for all heads": lambda n: uniform(1, 1, n, n, 32, 32),
    "an order for each query head": lambda n: clusters(1, HEADS, n, n, 4, 12),
    "an order for each head of k": lambda n: clusters(2, HEADS, n, n, 4, 12, kv_heads=KV_HEADS),
}
CASES = [*((kind, False) for kind in PLANS), *((kind, True) for kind in PLANS if "order" in kind)]


def length(device: torch.device, n: int) -> int:
    return n * 24 if device.type == "cuda" else n


def tokens(device, n, kv_heads=KV_HEADS, dim=DIM, batch=2):
    """In the memory of a projection, heads side by side."""
    return [torch.randn(batch, n, h, dim).to(device).transpose(1, 2) for h in (HEADS, kv_heads, kv_heads)]


def repeated(q, k, v):
    return q, *(x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))


@pytest.mark.parametrize(("kind", "gather_kv"), CASES)
def test_forward_and_backward(device, kind, gather_kv):
    n = length(device, 40)
    plan, mask = PLANS[kind](n)
    inputs = [x.requires_grad_() for x in tokens(device, n, batch=plan.lead[0])]
    out, lse = TritonBackend(gather_kv).attend(*inputs, plan.to(device), 0.1, True)
    expected, sums = masked_attention(*repeated(*inputs), mask.to(device), 0.1)
    torch.testing.assert_close(out.double(), expected, atol=3e-6, rtol=3e-6)
    torch.testing.assert_close(lse.double(), sums, atol=3e-6, rtol=3e-6)
    weight = torch.randn_like(expected) * (sums > -torch.inf).unsqueeze(-1)
    got = torch.autograd.grad((out * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected.nan_to_num() * weight).sum(), inputs)
    for one, other, x in zip(got, wanted, inputs, strict=True):
        assert one.shape == x.shape and one.stride() == x.stride()
        torch.testing.assert_close(one, other.nan_to_num().to(one.dtype), atol=1e-4, rtol=1e-4)


def test_one_head_of_k_and_v_for_all(device):
    n = length(device, 60)
    plan, mask = PLANS["an order for each query head"](n)
    inputs = tokens(device, n, kv_heads=1)
    out, _ = TritonBackend().attend(*inputs, plan.to(device), 0.1, False)
    expected, _ = masked_attention(*repeated(*inputs), mask.to(device), 0.1)
    torch.testing.assert_close(out.double(), expected, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("kind", ["for all heads", "an order for each head of k"])
def test_keys_through_descriptors(device, kind):
    n = length(device, 70)
    plan, mask = PLANS[kind](n)
    plan, dtype = plan.to(device), torch.float16 if device.type == "cuda" else torch.float32
    q, k, v = (x.to(dtype) for x in tokens(device, n, batch=plan.lead[0]))
    out, lse = results(q)
    ordered = (permute(x, plan.kv_order) for x in (k, v))
    launch_forward(q, *ordered, out, lse, plan, plan.q_order, None, 0.1 * LOG2E, DESCRIBED)
    expected, _ = masked_attention(*repeated(q, k, v), mask.to(device), 0.1)
    tolerance = 2e-3 if dtype == torch.float16 else 3e-6
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


def test_stand_ins_of_each_query_head(device):
    n = length(device, 60)
    plan, _ = clusters(1, HEADS, n, n, 4, 12, kv_heads=KV_HEADS)
    tables = [torch.randn(1, HEADS, 4, 12, DIM) for _ in range(2)]
    plan = replace(plan, skipped=SkippedClusters(*tables, torch.randn(1, HEADS, 4, 12))).to(device)
    inputs = tokens(device, n)
    ours = sparse_attention(*inputs, plan, backend="triton", return_lse=True)
    theirs = sparse_attention(*repeated(*inputs), plan, backend="reference", return_lse=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize(("kind", "gather_kv"), CASES)
def test_int8_scores(device, kind, gather_kv):
    n = length(device, 40)
    plan, _ = PLANS[kind](n)
    plan = plan.to(device)
    q, k, v = tokens(device, n, batch=plan.lead[0])
    k = k + 3 * torch.randn(KV_HEADS, 1, DIM, device=device)
    out, lse = TritonBackend(gather_kv).attend_quantized(q, k, v, plan, 0.1, True, Precision("int8"))
    _, k_block = int8_tiles(q, plan.tile_len, plan.block[1] if plan.block else 0, False)
    expected, sums = int8_attention(*repeated(q, k, v), plan, 0.1, k_block=k_block)
    tolerance = 5e-3 if device.type == "cuda" else 5e-6
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), sums, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("order_heads", [1, KV_HEADS, HEADS])
@pytest.mark.parametrize("heads", [1, KV_HEADS, HEADS])
def test_orders_and_fp8_values(device, heads, order_heads):
    """Of the heads of x and of the order, the fewer are repeated."""
    x = torch.randn(2, 70, heads, 40).to(device).transpose(1, 2)
    order = torch.rand(1, order_heads, 70).argsort(-1).to(device)
    wide = max(heads, order_heads)
    expected = x.repeat_interleave(wide // heads, 1).gather(
        2, order.repeat_interleave(wide // order_heads, 1)[..., None].expand(2, wide, 70, 40)
    )
    assert permute(x, order).equal(expected) and permute_rows(x, order).equal(expected)
    for ours, theirs in zip(quantize.quantize_v(x, order), quantize.quantize_v(expected, None), strict=True):
        assert ours.float().equal(theirs.float())


def test_profiled_rows(device, monkeypatch):
    n = length(device, 150)
    if device.type == "cpu":
        monkeypatch.setattr(profile, "SPLIT", 64)
    _, k, v = tokens(device, n)
    q = torch.randn(2, HEADS, 5, DIM, device=device)
    masks = torch.rand(2, 5, n, device=device) < 0.3
    shared, own = (profile.attend_rows(*call, masks, 0.1) for call in ((q, k, v), repeated(q, k, v)))
    for one, other in zip(shared, own, strict=True):
        assert one.equal(other)


def test_the_probe(device):
    n, count, found = length(device, 150), 7, []
    _, k, v = tokens(device, n)
    q_means = torch.randn(2, HEADS, 21, DIM, device=device)
    labels = (torch.rand(2, KV_HEADS, n) * count).long()
    order = labels.argsort(stable=True, dim=-1).to(device)
    sizes = torch.stack([torch.bincount(x, minlength=count) for x in labels.flatten(0, 1)]).view(2, KV_HEADS, count)
    sizes = sizes.to(device)
    for repeat in (1, HEADS // KV_HEADS):
        call = (x.repeat_interleave(repeat, 1) for x in (k, v, order, sizes))
        found.append(probe_clusters(q_means, *call, 0.125, room=1))
    for one, other in zip(*found, strict=True):
        assert one.equal(other)


def test_a_whole_plan(device):
    """What Tangent plans for shared heads, in the kernels."""
    layout = VideoLayout(3, 5, 6, text_before=2)
    inputs = tokens(device, layout.tokens)
    plan = Tangent(density=0.5, probe=True, q_clusters=4, k_clusters=6).plan(*inputs, layout, PlanMemory())
    out = sparse_attention(*inputs, plan, backend="triton")
    expected = sparse_attention(*repeated(*inputs), plan, backend="reference")
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_the_operator_keeps_its_promises(device):
    plan = clusters(1, HEADS, 24, 24, 3, 5)[0].to(device)
    inputs = [x.requires_grad_() for x in tokens(device, 24, dim=16, batch=1)]
    described = (plan.tile_start, plan.tile_len, plan.run_start, plan.run_len, plan.q_order, plan.kv_order)
    arguments = (*inputs, *described, [], [], 0.1, False, None, None, None, None)
    checks = ("test_schema", "test_faketensor")  # the slow ones run where there are as many heads
    torch.library.opcheck(block_sparse.block_sparse_attention, arguments, test_utils=checks)
    detached = [x.detach() for x in inputs]
    out, lse = block_sparse.block_sparse_attention(*detached, *arguments[3:])
    grads = (torch.randn_like(out), torch.randn_like(lse))
    arguments = (*grads, *detached, *described, None, None, None, out, lse, [], 0.1)
    torch.library.opcheck(block_sparse_backward.block_sparse_attention_backward, arguments, test_utils=checks)
