"""What stands for skipped clusters, in the forward and the query kernel: against the definition in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plans import clusters

from vidaccel import sparse_attention
from vidaccel.attention.skipped import SkippedClusters

pytest.importorskip("triton")

TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def case(device, kind, dim, dtype=torch.float32, n=101, heads=2, share=0.4):
    """q, k, v, and a plan of ragged clusters, some empty, whose skipped ones have stand-ins."""
    if torch.device(device).type == "cuda":
        n *= 12
    plan, mask = clusters(1, heads, n, n, 5, 70, share=share, skew=1.5)
    q, k, v = (torch.randn(1, heads, n, dim).to(device, dtype) for _ in range(3))
    tiles = (plan.tile_len.shape[-1],)
    shape = (1, heads, *(tiles if kind == "own" else ()), 70)
    tables = [torch.randn(*shape, dim).to(dtype).float() for _ in range(2)]
    bias = None if kind == "shared" else torch.randn(1, heads, *tiles, 70)
    plan = replace(plan, skipped=SkippedClusters(*tables, bias))
    return [q, k, v], plan.to(device), mask.to(device)


def written_out(q, k, v, plan, mask):
    """The definition in float64, row by row: own keys, then one key for each cluster that is skipped and not empty."""
    q, k, v = q.double(), k.double(), v.double()
    selected, sizes = plan.selection
    tile = plan.tile_of_token()
    scale = q.shape[-1] ** -0.5
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    key, value, bias = plan.skipped.key.double(), plan.skipped.value.double(), plan.skipped.bias
    if not plan.skipped.of_each_tile:
        key, value = (x.unsqueeze(2).expand(-1, -1, selected.shape[2], -1, -1) for x in (key, value))
    if bias is None:
        bias = sizes.double().log().unsqueeze(2).expand(selected.shape)
    own = torch.where(selected | (sizes == 0).unsqueeze(2), -torch.inf, bias.double())
    outs, sums = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float64, device=q.device)
    for h in range(q.shape[1]):
        mine = tile[0, h]
        extra = torch.einsum("nd,ncd->nc", q[0, h], key[0, h][mine]) * scale + own[0, h][mine]
        both = torch.cat([scores[0, h], extra], -1)
        sums[0, h] = both.logsumexp(-1)
        weights = both.softmax(-1).nan_to_num(0.0)
        outs[0, h] = weights[:, : k.shape[2]] @ v[0, h]
        outs[0, h] += torch.einsum("nc,ncd->nd", weights[:, k.shape[2] :], value[0, h][mine])
    return outs, sums


@pytest.mark.parametrize(
    ("kind", "dim", "dtype"),
    [
        ("shared", 64, torch.float32),
        ("biased", 64, torch.float32),
        ("own", 64, torch.float32),
        ("own", 96, torch.float32),
        ("own", 128, torch.float16),
        pytest.param("own", 128, torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param("shared", 64, torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
def test_equals_the_definition(device, kind, dim, dtype):
    tensors, plan, mask = case(device, kind, dim, dtype)
    expected, sums = written_out(*tensors, plan, mask)
    out, lse = sparse_attention(*tensors, plan, backend="triton", return_lse=True)
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), sums, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_tiles_that_read_no_key_of_their_own(device):
    tensors, plan, mask = case(device, "own", 64, share=0.0)
    expected, sums = written_out(*tensors, plan, mask)
    out, lse = sparse_attention(*tensors, plan, backend="triton", return_lse=True)
    torch.testing.assert_close(out.double(), expected, atol=3e-6, rtol=3e-6)
    torch.testing.assert_close(lse.double(), sums, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("kind", ["shared", "own"])
def test_gradients_are_those_of_the_definition(device, kind):
    tensors, plan, mask = case(device, kind, 64, n=60)
    grad = torch.randn_like(tensors[0])
    tensors = [x.requires_grad_() for x in tensors]
    expected = torch.autograd.grad(written_out(*tensors, plan, mask)[0], tensors, grad.double())
    found = torch.autograd.grad(sparse_attention(*tensors, plan, backend="triton"), tensors, grad)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.float(), atol=2e-5, rtol=2e-5)
