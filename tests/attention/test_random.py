"""The control: its blocks are those of one draw, and need no memory for all heads at once."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vidaccel import SVG, SparseAttention, VideoLayout
from vidaccel.attention import PlanMemory, RandomBlocks, StepInfo, runs
from vidaccel.attention.methods.base import OutOfReach
from vidaccel.attention.runs import merge_segments


def test_its_blocks_are_the_largest_of_one_draw():
    q, memory = torch.zeros(2, 3, 160, 8), PlanMemory()
    method, generator = RandomBlocks(density=0.4, seed=5), torch.Generator().manual_seed(5)
    for _ in range(2):
        made = method.plan(q, q, q, VideoLayout(10, 4, 4), memory)
        scores = torch.rand(2, 3, 10, 10, generator=generator)
        kept = torch.zeros_like(scores).scatter_(-1, scores.topk(4).indices, 1).bool()
        assert made.to_dense_mask().equal(kept.repeat_interleave(16, -1).repeat_interleave(16, -2))


def test_the_density_that_is_promised_is_that_of_whole_blocks():
    """The last block may be short: over all draws it is read as often as any other."""
    layout, memory = VideoLayout(5, 5, 5, text_after=3), PlanMemory()  # 8 blocks of 16
    method = RandomBlocks.for_density(layout, 0.3)
    assert method.density == 0.3 and method.expected_density(layout) == 2 / 8
    q = torch.zeros(4, 8, layout.tokens, 1)
    made = [method.plan(q, q, q, layout, memory).density() for _ in range(20)]
    assert sum(made) / len(made) == pytest.approx(2 / 8, abs=0.002)


def test_less_than_one_block_is_refused():
    layout = VideoLayout(10, 4, 4)
    RandomBlocks.for_density(layout, 0.06)  # one of ten is the nearest
    said = (
        "density 0.04 is below 0.100, which is one block of 16 tokens for each query: raise it, or use smaller blocks"
    )
    with pytest.raises(OutOfReach, match=said) as refused:
        RandomBlocks.for_density(layout, 0.04)
    assert refused.value.least == 0.1 and refused.value.eased_by == ("block_size",)
    with pytest.raises(OutOfReach, match="density 0.04"):
        SparseAttention(RandomBlocks(density=0.04), num_layers=1).enter(StepInfo(num_steps=1), layout)
    RandomBlocks(density=0.04, block_size=4).check(layout)


@pytest.mark.parametrize("method", [RandomBlocks, SVG])
def test_a_seed_is_a_whole_number_that_torch_takes(method):
    for seed in ("a", 1.5, True, None, 2**64, -(2**63) - 1):
        with pytest.raises(
            ValueError, match=re.escape(f"{method.__name__} seed is {seed!r}: it must be a whole number")
        ):
            method(seed=seed)
    for seed in (-(2**63), 2**64 - 1):
        q = torch.zeros(1, 1, 160, 8)
        method(seed=seed).plan(q, q, q, VideoLayout(10, 4, 4), PlanMemory())


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that was made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.bytes = max(self.bytes, *sizes, 0)
        return out


def test_no_tensor_has_eight_bytes_for_each_pair_of_blocks_of_all_heads(monkeypatch):
    monkeypatch.setattr(runs, "MOST_AT_ONCE", 1)
    q = torch.zeros(1, 8, 1600, 1)
    with Largest() as largest:
        RandomBlocks(density=0.1).plan(q, q, q, VideoLayout(100, 4, 4), PlanMemory())
    assert largest.bytes <= 8 * 100**2


def test_runs_that_are_merged_a_head_at_a_time_are_the_same(monkeypatch):
    sizes = torch.randint(0, 3, (1, 3, 40))
    selected = torch.rand(2, 3, 5, 40) < torch.tensor([0.02, 0.5, 0.9]).view(1, 3, 1, 1)  # unlike numbers of runs
    for slots in (None, 20):
        monkeypatch.setattr(runs, "MOST_AT_ONCE", 2**24)
        expected = merge_segments(selected, sizes, slots)
        monkeypatch.setattr(runs, "MOST_AT_ONCE", 100)
        found = merge_segments(selected, sizes, slots)
        assert all(
            ours.dtype == torch.int32 and ours.equal(theirs) for ours, theirs in zip(found, expected, strict=True)
        )
