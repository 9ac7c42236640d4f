"""How an output follows its query: against the definition in float64, in torch and in the kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plans import clusters

from vidaccel import sparse_attention
from vidaccel.attention.clustering import slopes
from vidaccel.attention.skipped import SkippedClusters

pytest.importorskip("triton")

TOLERANCE = {torch.float32: 3e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@pytest.fixture(params=["torch", "kernel"])
def way(request, monkeypatch):
    monkeypatch.setattr(slopes, "use_kernels", lambda x: request.param == "kernel")


def case(device, dim, dtype=torch.float32, tiles=6, with_slope=5, centred=True, n=90):
    """Some output and q, as models hold them, and a plan of ragged tiles, some empty; the last have no slope."""
    plan, _ = clusters(2, 3, n, n, tiles, 9, share=0.4, skew=1.5)
    out, q = (torch.randn(2, n, 3, dim).transpose(1, 2).to(device, dtype) for _ in range(2))
    slope = torch.randn(2, 3, with_slope, dim, dim).to(dtype) * dim**-0.5
    centre = torch.randn(2, 3, with_slope, dim) if centred else None
    tables = (torch.randn(2, 3, 9, dim), torch.randn(2, 3, 9, dim))
    return out, q, replace(plan, skipped=SkippedClusters(*tables, None, slope, centre)).to(device)


def written_out(out, q, plan):
    """The definition, token by token."""
    slope, centre = plan.skipped.slope.double(), plan.skipped.centre
    made, tile = out.double().clone(), plan.tile_of_token().expand(q.shape[:3])
    for b, h, n in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        if (own := int(tile[b, h, n])) < slope.shape[2]:
            beyond = q[b, h, n].double() - (0 if centre is None else centre[b, h, own].double())
            made[b, h, n] += beyond @ slope[b, h, own]
    return made


@pytest.mark.parametrize(
    ("dim", "dtype", "options"),
    [
        (16, torch.float32, {}),
        (96, torch.float32, {"centred": False}),
        (128, torch.float16, {"n": 150, "tiles": 2, "with_slope": 2}),
        (20, torch.float32, {"tiles": 30, "with_slope": 30}),
        pytest.param(128, torch.bfloat16, {"n": 3000}, marks=pytest.mark.gpu),
    ],
)
def test_equals_the_definition(device, way, dim, dtype, options):
    out, q, plan = case(device, dim, dtype, **options)
    found = slopes.follow(out, q, plan)
    assert found.dtype == dtype and found.stride() == out.stride()
    torch.testing.assert_close(found.double(), written_out(out, q, plan), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_gradients_flow_to_the_output_and_to_q(device, way):
    out, q, plan = case(device, 16)
    inputs = [x.detach().double().requires_grad_() for x in (out, q)]
    grad = torch.randn_like(inputs[0])
    expected = torch.autograd.grad(written_out(*inputs, plan), inputs, grad)
    inputs = [x.detach().float().requires_grad_() for x in (out, q)]
    for ours, theirs in zip(
        torch.autograd.grad(slopes.follow(*inputs, plan), inputs, grad.float()), expected, strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "gather", "masked", "reference", "triton"])
def test_a_plan_of_inference_mode_serves_in_training_too(device, backend):
    """Its tiles and orders, its stand-ins and their slopes; those of triton and reference had no gradients."""
    if device.type != "cpu" and backend in ("gather", "masked"):
        pytest.skip("made for the CPU")
    _, q, plan = case(device, 32)
    with torch.inference_mode():
        within = plan._with_each(torch.clone, lambda plan: plan)
    k, v, grads = torch.randn_like(q), torch.randn_like(q), []
    for each in (plan, within, within):
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        grads.append(torch.autograd.grad(sparse_attention(*inputs, each, backend=backend).sum(), inputs))
    for others in grads[1:]:
        assert all(torch.equal(one, other) for one, other in zip(grads[0], others, strict=True))
    assert within.for_gradients() is within.for_gradients() and plan.for_gradients() is plan


def test_the_memory_layout_is_that_of_the_output(device, way):
    out, q, plan = case(device, 16)
    strange = out.transpose(-1, -2).contiguous().transpose(-1, -2)
    found = slopes.follow(strange, q, plan)
    assert found.stride() == strange.stride()
    torch.testing.assert_close(found, slopes.follow(out, q, plan))


def test_it_is_in_what_every_backend_makes(device):
    """Under autocast too, and beside a log-sum-exp, which it leaves alone."""
    _, q, plan = case(device, 32)
    k, v = torch.randn_like(q), torch.randn_like(q)
    alone = replace(plan, skipped=replace(plan.skipped, slope=None, centre=None))
    for backend in ("reference", "triton", *(["gather", "masked"] if device.type == "cpu" else [])):
        before, sums = sparse_attention(q, k, v, alone, backend=backend, return_lse=True)
        out, lse = sparse_attention(q, k, v, plan, backend=backend, return_lse=True)
        torch.testing.assert_close(out, slopes.follow(before, q, plan), atol=1e-4, rtol=1e-4)
        assert torch.equal(sums, lse)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert slopes.follow(before, q, plan).dtype == torch.float32


def test_a_table_for_other_heads_or_channels_is_refused():
    key = torch.zeros(1, 2, 5, 8)
    for slope, centre in (
        ((1, 2, 3, 8, 4), None),
        ((1, 1, 3, 8, 8), None),
        ((1, 2, 3, 8, 8), (1, 2, 4, 8)),
        (None, (1, 2, 3, 8)),
    ):
        tables = (None if x is None else torch.zeros(x) for x in (slope, centre))
        with pytest.raises(ValueError, match=r"slope \[B, H, S, D, D\]"):
            SkippedClusters(key, key, None, *tables)
