from __future__ import annotations

import pytest
import torch

from vidaccel import DenseSchedule, SparseAttention, VideoLayout
from vidaccel.attention import RandomBlocks, StepInfo

LAYOUT = VideoLayout(3, 4, 5)


def test_large_numbers_are_refused_only_where_float32_has_none_for_them():
    """Their sum is infinite in float32, where none of them is."""
    q, k, v = torch.randn(3, 1, 2, LAYOUT.tokens, 8)
    engine = SparseAttention(RandomBlocks(), num_layers=1, schedule=DenseSchedule())
    engine.enter(StepInfo(), LAYOUT)
    large = torch.full_like(q, 1e37)
    assert engine(large, k * 1e-37, v, 0).isfinite().all()
    with pytest.raises(ValueError, match="1 of .* values of q are NaN or infinite in float32, in which plans are made"):
        large = large.double()
        large[0, 1, 7, 3] = 1e39
        engine(large, k.double(), v.double(), 0)
