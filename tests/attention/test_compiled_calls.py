"""`sparse_attention` within a function that a user compiles."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from vidaccel import SVG, BlockPlan, Tangent, VideoLayout, sparse_attention
from vidaccel.attention import Method, PlanMemory

LAYOUT = VideoLayout(5, 4, 7, text_before=3, text_after=2)


@pytest.mark.parametrize("method", [SVG(density=0.8), Tangent(density=0.9)], ids=lambda method: method.name)
def test_gather_makes_no_graph_for_each_tile(method: Method):
    """It made 53, which took half a minute, and came to the limit of torch."""
    q, k, v = torch.randn(3, 1, 2, LAYOUT.tokens, 16)
    plan, counter = method.plan(q, k, v, LAYOUT, PlanMemory()), CompileCounter()
    torch._dynamo.reset()

    @torch.compile(backend=counter)
    def block(q):
        return 2 * sparse_attention(q + 0.5, k, v, plan, backend="gather")

    torch.testing.assert_close(block(q), 2 * sparse_attention(q + 0.5, k, v, plan, backend="gather"))
    assert counter.frame_count < 8
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_training_step_is_one_graph_wherever_its_plan_was_made(mode):
    with mode():
        plan = BlockPlan.from_block_mask(torch.rand(4, 4) < 0.5, 16, 16, 64, 64)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: sparse_attention(*x, plan, backend="reference"), backend=counter)
    for _ in range(2):
        inputs = torch.randn(3, 1, 2, 64, 16, requires_grad=True).unbind(0)
        expected = sparse_attention(*inputs, plan, backend="reference")  # which keeps a copy of the plan
        torch.testing.assert_close(compiled(*inputs), expected)
    assert counter.frame_count == 1
    torch._dynamo.reset()
