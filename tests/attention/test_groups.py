"""Grouped-query attention: what k and v of fewer heads give is what the same call gives with k and v repeated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from live_bytes import LiveBytes
from plans import clusters, masked_attention, uniform, untrained

from vidaccel import (
    SVG,
    SVG2,
    BlockPlan,
    DenseSchedule,
    Radial,
    Sparge,
    SparseAttention,
    Tangent,
    VideoLayout,
    sparse_attention,
)
from vidaccel.attention import METHODS, PlanMemory, StepInfo
from vidaccel.attention.account.meter import relative_error, sample_rows
from vidaccel.attention.clustering import probe as probes
from vidaccel.attention.groups import by_group, by_head, dense_attention, group_product, repeat_heads
from vidaccel.attention.orders import permute
from vidaccel.attention.skipped import SkippedClusters

B, H, N, D = 2, 6, 90, 16
CPU = torch.device("cpu")
ON_CPU = ("gather", "masked", "reference")
# By name, for a number of key-value heads: a plan and its dense mask.
PLANS = {
    "uniform": lambda kv: uniform(B, H, N, N, 16, 16),
    "for all heads": lambda kv: uniform(1, 1, N, N, 16, 16),
    "an order for each query head": lambda kv: clusters(B, H, N, N, 5, 12),
    "an order for each head of k": lambda kv: clusters(B, H, N, N, 5, 12, kv_heads=kv),
    "one order": lambda kv: clusters(1, 1, N, N, 5, 12),
}
LAYOUT = VideoLayout(4, 6, 7)
WITH_TEXT = VideoLayout(4, 6, 7, text_before=3, text_after=9)
CASES = [
    *(Tangent(density=0.4) if name == "tangent" else untrained(name) for name in METHODS),
    Tangent(density=0.4, probe=True),
    SVG2(density=0.5, compensate=True),
    SVG2(density=0.5, route="error"),
    SVG2(density=0.5, route="error", compensate=True),
    Sparge(topk=0.2, similarity=0.0625, block=(16, 16)),  # some blocks of random tokens pass
]


def tokens(kv_heads: int, n: int = N, dtype: torch.dtype = torch.float32, heads: int = H):
    return tuple(torch.randn(B, h, n, D).to(dtype) for h in (heads, kv_heads, kv_heads))


def repeated(q, k, v):
    """The same call with a head of k and v for each query head."""
    return q, *(x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))


@pytest.mark.parametrize("kv_heads", [1, 2, 3])
@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("backend", ON_CPU)
def test_outputs_and_log_sum_exps_are_those_of_repeated_heads(backend, kind, kv_heads):
    plan, mask = PLANS[kind](kv_heads)
    inputs = tokens(kv_heads)
    expected, sums = masked_attention(*repeated(*inputs), mask)
    out, lse = sparse_attention(*inputs, plan, backend=backend, return_lse=True)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(lse.double(), sums, atol=2e-6, rtol=2e-6)
    without = sparse_attention(*inputs, plan, backend=backend)
    torch.testing.assert_close(without.double(), expected, atol=2e-6, rtol=2e-6)
    same = sparse_attention(*repeated(*inputs), plan, backend=backend)
    torch.testing.assert_close(same.double(), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.compiler
@pytest.mark.parametrize("kind", ["for all heads", "an order for each head of k", "an order for each query head"])
def test_flex_shares_heads_too(kind):
    plan, mask = PLANS[kind](2)
    inputs = tokens(2)
    out = sparse_attention(*inputs, plan, backend="flex")
    torch.testing.assert_close(out.double(), masked_attention(*repeated(*inputs), mask)[0], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("backend", ON_CPU)
def test_gradients_are_those_of_repeated_heads(backend, kind):
    plan, mask = PLANS[kind](2)
    rows = mask.any(-1, keepdim=True)
    inputs = [x.requires_grad_() for x in tokens(2, dtype=torch.float64)]
    weight = torch.randn(B, H, N, D, dtype=torch.float64) * rows
    got = torch.autograd.grad((sparse_attention(*inputs, plan, backend=backend) * weight).sum(), inputs)
    # SDPA's own gradient is NaN for a row without keys; compare where it is defined.
    expected = torch.autograd.grad((masked_attention(*repeated(*inputs), mask | ~rows)[0] * weight).sum(), inputs)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_calls_share_heads(dtype):
    inputs = tokens(2, dtype=dtype)
    expected, _ = masked_attention(*repeated(*inputs), torch.ones(N, N, dtype=torch.bool), 0.3)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    for out in (
        sparse_attention(*inputs, BlockPlan.dense(N, N), backend="sdpa", scale=0.3),
        dense_attention(*inputs, 0.3),
        F.scaled_dot_product_attention(*inputs, scale=0.3, enable_gqa=True),  # torch means the same by it
    ):
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("own", [False, True], ids=["of all tiles", "of each tile"])
@pytest.mark.parametrize("plan_heads", [1, H])
@pytest.mark.parametrize("backend", ON_CPU)
def test_stand_ins_of_each_query_head(backend, plan_heads, own):
    plan, _ = clusters(1, plan_heads, N, N, 5, 12)
    shape = (1, H, *([5] if own else []), 12)
    bias = torch.randn(shape) if own else None
    plan = replace(plan, skipped=SkippedClusters(torch.randn(*shape, D), torch.randn(*shape, D), bias))
    inputs = tokens(2)
    results = [
        sparse_attention(*call, plan, backend=name, return_lse=True)
        for call, name in ((inputs, backend), (repeated(*inputs), "reference"))
    ]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=5e-6)


# -- planning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [LAYOUT, WITH_TEXT], ids=["video", "text"])
@pytest.mark.parametrize("method", CASES, ids=lambda m: m.name)
def test_plans_are_those_of_repeated_heads(method, layout):
    """At a first and at a later step: the same pairs, the same stand-ins."""
    inputs, memories = tokens(2, layout.tokens), (PlanMemory(), PlanMemory())
    for _ in range(2):
        shared, own = (
            method.plan(*call, layout, memory)
            for call, memory in zip((inputs, repeated(*inputs)), memories, strict=True)
        )
        if method.name == "random":  # draws anew
            continue
        shared.validate()
        assert shared.to_dense_mask().equal(own.to_dense_mask()) and shared.pairs().equal(own.pairs())
        assert shared.density() == own.density() < 1
        outs = [
            sparse_attention(*call, plan, backend="reference")
            for call, plan in ((inputs, shared), (repeated(*inputs), own), (repeated(*inputs), shared))
        ]
        for other in outs[1:]:
            torch.testing.assert_close(outs[0], other, atol=5e-6, rtol=5e-6)


def test_the_probe_that_may_not_look_at_sizes_shares_heads_too(monkeypatch):
    monkeypatch.setattr(probes, "on_the_host", lambda device: False)
    method, inputs = Tangent(density=0.4, probe=True), tokens(2, WITH_TEXT.tokens)
    shared, own = (method.plan(*call, WITH_TEXT, PlanMemory()) for call in (inputs, repeated(*inputs)))
    torch.testing.assert_close(shared.skipped.value, own.skipped.value)
    torch.testing.assert_close(shared.skipped.bias, own.skipped.bias)


@pytest.mark.parametrize(
    ("method", "heads"), [(SVG2(), 2), (Tangent(density=0.4), 2), (SVG(), H), (Radial(), None), (Sparge(), None)]
)
def test_keys_are_ordered_for_as_many_heads_as_the_method_needs(method, heads):
    """And nothing but that order decides how many heads of k and v are copied."""
    inputs = tokens(2, LAYOUT.tokens)
    plan = method.plan(*inputs, LAYOUT, PlanMemory())
    if heads is None:
        assert plan.kv_order is None and permute(inputs[1], plan.kv_order) is inputs[1]
    else:
        assert permute(inputs[1], plan.kv_order).shape[1] == heads


@pytest.mark.parametrize("method", [SVG2(density=0.4), Tangent(density=0.4), Radial(), Sparge()], ids=lambda m: m.name)
def test_k_and_v_take_no_more_memory_than_they_have_heads(method):
    """In planning and in attention, where four query heads share a head: less than with k and v repeated."""
    layout = VideoLayout(8, 8, 8)
    q, k, v = tokens(2, layout.tokens, heads=8)
    peaks = []
    for call in ((q, k, v), repeated(q, k, v)):
        with torch.no_grad(), LiveBytes() as live:
            plan = method.plan(*call, layout, PlanMemory())
            made = live.peak
            sparse_attention(*call, plan, backend="gather")
            peaks.append((made, live.peak))
    assert peaks[0][0] <= peaks[1][0]
    assert peaks[1][1] - peaks[0][1] >= 0.9 * 6 * k[:, :1].nbytes


# -- the engine --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CASES, ids=lambda m: m.name)
def test_an_engine_takes_fewer_heads_of_k_and_v(method):
    """In dense and in sparse steps; density and measured error are those of repeated heads."""
    inputs = tokens(2, WITH_TEXT.tokens)
    outs, reports = [], []
    for call in (inputs, repeated(*inputs)):
        engine = SparseAttention(method, num_layers=1, schedule=DenseSchedule(first_steps=1), measure_error=32)
        for step in range(3):
            engine.enter(StepInfo(step=step, num_steps=3), WITH_TEXT)
            outs.append(engine(*call, 0))
        reports.append(engine.report().records)
    for ours, theirs in zip(outs[:3], outs[3:], strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=5e-6)
    for ours, theirs in zip(*reports, strict=True):
        assert ours.density == theirs.density and ours.reason == theirs.reason
        facts = [[r.error or 0.0, r.predicted_error or 0.0] for r in (ours, theirs)]
        assert facts[0] == pytest.approx(facts[1], rel=1e-4) and (facts[0][0] > 0) == (not ours.reason)


@pytest.mark.parametrize("name", ["svg2", "tangent"])
def test_gradients_through_an_engine_are_those_of_repeated_heads(name):
    grads = []
    inputs = tokens(2, LAYOUT.tokens)
    for repeat in (False, True):
        leaves = [x.clone().requires_grad_() for x in inputs]
        engine = SparseAttention(name, num_layers=1, schedule=DenseSchedule())
        engine.enter(StepInfo(num_steps=1), LAYOUT)
        engine(*(repeated(*leaves) if repeat else leaves), 0).square().sum().backward()
        grads.append([x.grad for x in leaves])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_what_an_engine_remembers_is_of_one_number_of_heads():
    """Centroids of two heads must not start the clusters of three."""
    engine = SparseAttention("svg2", num_layers=1, schedule=DenseSchedule())
    engine.enter(StepInfo(num_steps=1), LAYOUT)
    for kv_heads in (2, 3, 2, 6):
        assert engine(*tokens(kv_heads, LAYOUT.tokens), 0).shape == (B, H, LAYOUT.tokens, D)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_meter_shares_heads(device):
    inputs = tokens(2)
    out, rows = torch.randn(B, H, N, D), sample_rows(N, 16, 3, torch.device(device))
    got = relative_error(*(x.to(device) for x in (out, *inputs)), rows)
    assert got.shape == () and got.device.type == device  # on meta a read on the host would raise
    if device == "cpu":
        torch.testing.assert_close(got, relative_error(out, *repeated(*inputs), rows))


# -- what is refused, and what stays as it is --------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 4), (2, 4), (4, 3)])
def test_other_ratios_are_refused_with_both_numbers(heads, kv_heads):
    inputs = tokens(kv_heads, LAYOUT.tokens, heads=heads)
    message = f"q has {heads} heads, and k and v have {kv_heads}: .* multiple"
    with pytest.raises(ValueError, match=message):
        sparse_attention(*inputs, BlockPlan.dense(LAYOUT.tokens, LAYOUT.tokens))
    for first_steps in (0, 1):  # in dense layers too
        engine = SparseAttention("radial", num_layers=1, schedule=DenseSchedule(first_steps=first_steps))
        engine.enter(StepInfo(num_steps=2), LAYOUT)
        with pytest.raises(ValueError, match=message):
            engine(*inputs, 0)


def test_orders_that_cut_across_the_heads_of_k_are_refused():
    plan, _ = clusters(1, 12, N, N, 3, 5, kv_heads=4)
    with pytest.raises(ValueError, match="orders keys for 4 groups of heads, but k and v have 6 heads"):
        sparse_attention(*tokens(6, heads=12), plan)
    with pytest.raises(ValueError, match="kv_order is for 5 heads or groups of them, which must divide the 12 heads"):
        replace(plan, kv_order=torch.arange(N).expand(1, 5, N))
    for kv_heads in (1, 2, 4, 12):
        assert sparse_attention(*tokens(kv_heads, heads=12), plan).shape == (B, 12, N, D)


def test_as_many_heads_of_one_as_of_the_other_are_never_copied():
    x = torch.randn(B, H, N, D)
    assert repeat_heads(x, H) is by_group(x, H) is by_head(x, H) is x
    one = repeat_heads(x[:, :1], H)
    assert one.data_ptr() == x.data_ptr() and one.stride(1) == 0  # a view
    assert repeat_heads(x[:, :2], H).equal(x[:, [0, 0, 0, 1, 1, 1]])


def test_the_rows_of_a_group_lie_one_behind_the_other():
    x, y = torch.randn(B, H, 5, 7), torch.randn(B, 2, 7, 4)
    assert by_group(x, 2)[:, 1, 5:10].equal(x[:, 4]) and by_head(by_group(x, 2), H).equal(x)
    torch.testing.assert_close(group_product(x, y), x @ y.repeat_interleave(3, 1))


def test_orders_of_groups_need_tiles_for_each_head():
    """It was refused with another reason, that the plan was for as many heads as there are groups."""
    plan = replace(uniform(1, 1, N, N, 16, 16)[0], kv_order=torch.rand(1, 2, N).argsort(-1))
    q, k, v = tokens(2)
    with pytest.raises(ValueError, match=r"keys for 2 heads or groups .* one for all of the 6 heads of q: give tiles"):
        sparse_attention(q, k, v, plan)
    tables = {name: getattr(plan, name) for name in ("tile_start", "tile_len", "run_start", "run_len")}
    each = replace(plan, **{name: x.expand(1, H, *x.shape[2:]) for name, x in tables.items()}, selection=None)
    expected = masked_attention(*repeated(q, k, v), each.to_dense_mask())[0].float()
    for backend in ON_CPU:
        torch.testing.assert_close(sparse_attention(q, k, v, each, backend=backend), expected, atol=1e-5, rtol=1e-5)
