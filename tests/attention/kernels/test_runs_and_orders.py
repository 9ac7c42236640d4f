"""Runs and orders in one pass: the same as in torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from vidaccel.attention.kernels.permute import permute_rows
from vidaccel.attention.kernels.runs import cut_clusters, cut_segments, merge_segments
from vidaccel.attention.orders import permute
from vidaccel.attention.runs import cut_segments as cut_in_torch
from vidaccel.attention.runs import merge_segments as merge_in_torch


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.1])
@pytest.mark.parametrize("segments", [1, 7, 300])
def test_runs_are_those_of_torch(device, share, segments):
    sizes = torch.randint(0, 4, (2, 2, segments))  # a quarter of them empty
    selected = torch.rand(2, 2, 5, segments) < share
    slots = (segments + 1) // 2
    expected = merge_in_torch(selected, sizes, slots)
    found = merge_segments(selected.to(device), sizes.to(device), slots)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.int32 and ours.cpu().equal(theirs.where(expected[1] > 0, ours.cpu()))
    assert found[1].cpu().equal(expected[1])


@pytest.mark.parametrize("most", [1, 16, 1000])
@pytest.mark.parametrize("segments", [1, 6, 300])
def test_pieces_are_those_of_torch(device, segments, most):
    length = torch.randint(0, 40, (2, 3, segments)) * (torch.rand(2, 3, segments) < 0.7)
    length[0, 0] = 0  # a row of nothing
    total = int(length.sum(-1).max()) + 5
    start = length.cumsum(-1) - length
    expected = cut_in_torch(start, length, total, most)
    ours = cut_segments(start.to(device), length.int().to(device), total, most)
    for one, other in zip(ours, expected, strict=True):
        assert one.dtype == torch.int32 and one.cpu().equal(other)
    *pieces, first = cut_clusters(length.to(device), total, most)
    assert all(one.cpu().equal(other) for one, other in zip(pieces, expected, strict=False))
    count = (length + most - 1) // most
    assert first.cpu().equal((count.cumsum(-1) - count).int())


def test_orders_of_any_layout(device):
    x = torch.randn(2, 70, 3, 40).to(device).transpose(1, 2)
    for lead in ((2, 3), (1, 3), (2, 1), (1, 1)):
        order = torch.rand(*lead, 70).argsort(-1).to(device)
        found = permute_rows(x, order)
        assert found.is_contiguous() and found.equal(permute(x, order))


def test_sizes_of_any_layout(device):
    sizes = torch.randint(0, 4, (3, 2, 20)).transpose(0, 1)
    selected = torch.rand(2, 3, 5, 20) < 0.4
    expected = merge_in_torch(selected, sizes, 10)
    found = merge_segments(selected.to(device), sizes.to(device), 10)
    assert found[1].cpu().equal(expected[1])
    assert (found[0].cpu() * (expected[1] > 0)).equal(expected[0] * (expected[1] > 0))


def test_runs_beyond_the_slots_do_not_spill_into_the_next_row(device):
    selected = torch.zeros(1, 1, 2, 7, dtype=torch.bool)
    selected[:, :, 0, ::2] = True  # four runs, for two slots
    found = merge_segments(selected.to(device), torch.full((1, 1, 7), 3).to(device), 2)
    assert found[0][0, 0].tolist() == [[0, 6], [0, 0]] and found[1][0, 0].tolist() == [[3, 3], [0, 0]]
