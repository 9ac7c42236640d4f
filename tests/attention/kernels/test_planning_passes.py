"""Passes of planning as kernels, each against its own torch: ranks and budgets, samples, starts, orders with text."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from vidaccel import VideoLayout
from vidaccel.attention import runs as torch_runs
from vidaccel.attention.clustering import clusters as torch_clusters
from vidaccel.attention.clustering import spread as torch_spread
from vidaccel.attention.clustering.clusters import Clusters
from vidaccel.attention.kernels import permute, runs, sample, spend


@pytest.fixture
def in_torch(monkeypatch):
    for module in (torch_clusters, torch_spread, torch_runs):
        monkeypatch.setattr(module, "use_kernels", lambda x: False)


def sizes_of(*shape, device):
    """Some of them 0, also at both ends."""
    sizes = torch.randint(0, 9, shape, device=device) * (torch.rand(shape, device=device) < 0.7)
    sizes[0, 0, 0], sizes[0, 0, -1] = 0, 0
    return sizes


@pytest.mark.parametrize(("count", "clusters"), [(5, 300), (1, 1), (7, 33)])
def test_ranks_and_what_a_budget_takes(device, in_torch, count, clusters):
    mass, score_spread, value_spread, away = torch.rand(4, 2, 3, count, clusters, device=device)
    tables = (mass, score_spread, value_spread, away, *(sizes_of(2, 3, n, device=device) for n in (count, clusters)))
    found, expected = spend.rank_pairs(*tables), torch_clusters.rank_pairs(*tables)
    assert [x.dtype for x in found] == [torch.float32, torch.float32, torch.int64]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    _, rank, cost = expected
    flat, order = rank.flatten(1).sort(dim=-1, descending=True, stable=True)
    price = cost.flatten(1).gather(-1, order)
    for share in (-0.1, 0.0, 0.3, 1.0, 2.0):
        budget = share * cost.sum((1, 2, 3)).float()
        wanted = torch_clusters.spend(rank, cost, budget)
        assert spend.take(flat, order, price, budget).view(rank.shape).equal(wanted)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 40), (torch.float16, 16)])
def test_samples_of_clusters(device, in_torch, dtype, dim):
    sizes = sizes_of(2, 3, 40, device=device)
    sizes[..., 30] = 70  # more than a sample
    tokens = int(sizes.sum(-1).max())
    x = torch.randn(2, tokens, 3, dim, device=device).transpose(1, 2).to(dtype)
    order = torch.stack([torch.randperm(tokens) for _ in range(6)]).view(2, 3, tokens).to(device)
    for means in (torch.randn(2, 3, 40, dim, device=device), None):
        expected = torch_spread.deviations(x, Clusters(order, sizes, means, order), torch.float32)
        found = sample.deviations(x, order, sizes, means, torch_spread.SAMPLE, torch.float32)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("clusters", [1, 9, 300])
def test_starts_and_runs_with_empty_segments(device, in_torch, clusters):
    sizes = sizes_of(1, 2, clusters, device=device)
    for found, expected in zip(runs.starts_of(sizes), torch_runs.starts_of(sizes), strict=True):
        assert found.dtype == torch.int32 and found.equal(expected)
    for share in (0.0, 0.5, 1.0):
        selected = torch.rand(1, 2, 5, clusters, device=device) < share
        slots = (clusters + 1) // 2
        for found, expected in zip(
            runs.merge_segments(selected, sizes, slots), torch_runs.merge_segments(selected, sizes, slots), strict=True
        ):
            assert found.dtype == torch.int32 and found.equal(expected)


@pytest.mark.parametrize("text", [(0, 3), (4, 0), (2, 5), (3000, 1500)])
def test_orders_with_text(device, in_torch, text):
    layout = VideoLayout(2, 3, 4, text_before=text[0], text_after=text[1])
    order = torch.stack([torch.randperm(24) for _ in range(2)]).view(1, 2, 24).to(device)
    assert permute.text_last(order, *text).equal(torch_clusters.text_last(order, layout))


def test_many_clusters_do_not_keep_the_kernels_away(monkeypatch):
    """Whether they can work is asked with a tensor whose last dimension, if it is one of floats, is channels."""
    asked = []
    monkeypatch.setattr(torch_clusters, "use_kernels", lambda x: asked.append(x) or False)
    tables = torch.rand(4, 1, 2, 4, 300)
    sizes = [torch.randint(1, 9, (1, 2, n)) for n in (4, 300)]
    _, rank, cost = torch_clusters.rank_pairs(*tables, *sizes)
    torch_clusters.spend(rank, cost, torch.ones(1))
    assert len(asked) == 2 and not any(x.is_floating_point() for x in asked)
