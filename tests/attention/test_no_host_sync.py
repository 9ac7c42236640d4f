"""Planning a step on an accelerator reads nothing on the host: shown with tensors on `meta`, which have no values."""

from __future__ import annotations

import pytest
import torch

from vidaccel import SLA, SVG2, VSA, Sparge, VideoLayout
from vidaccel.attention import Method, PlanMemory
from vidaccel.attention.running_sum import sum_by_doubling
from vidaccel.attention.runs import merge_segments

LAYOUT = VideoLayout(3, 4, 5, text_before=2, text_after=3)


@pytest.mark.parametrize("kv_heads", [3, 1])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"density": 0.6},
        {"density": 0.8, "compensate": True},
        *({"density": 0.8, "compensate": c, "route": "error"} for c in (False, True)),
    ],
)
def test_svg2_plans_both_the_first_and_a_later_step(settings, kv_heads):
    heads = (3, kv_heads, kv_heads)
    q, k, v = (torch.empty(2, h, LAYOUT.tokens, 16, device="meta", dtype=torch.bfloat16) for h in heads)
    memory = PlanMemory()
    method = SVG2(q_clusters=5, k_clusters=9, init_iterations=3, **settings)
    for _ in range(2):
        plan = method.plan(q, k, v, LAYOUT, memory)
    assert plan.device.type == "meta" and plan.run_start.shape[-1] == 5  # nine clusters and the text make at most five
    assert plan.cut(16)[0].shape == (2, 3, LAYOUT.tokens // 16 + 6)
    assert plan.pairs().shape == (2, 3) and plan.tile_of_token().shape == (2, 3, LAYOUT.tokens)


@pytest.mark.parametrize(
    ("method", "runs"),
    [
        (SLA(topk=0.2, block=(4, 4), linear_scope="none"), 3 + 2),  # 3 of 15 key blocks, and the text on both sides
        (Sparge(topk=0.2, block=(4, 4)), 3 + 2),
        (Sparge(topk=0.2, block=(4, 4), sink=True), 3 + 1 + 2),
        (Sparge(topk=0.9, block=(4, 4)), 9),  # 17 blocks make no more
        (Sparge(topk=0.2, block=(4, 4), similarity=0.5), 9),
        (Sparge(cdf=0.9, block=(4, 4)), 9),
        (VSA(density=0.2, cube=(1, 2, 2)), 4 + 1),  # 4 of 18 cubes, and the text in one
    ],
    ids=lambda x: x.name if isinstance(x, Method) else str(x),
)
def test_blocks_have_room_for_as_many_runs_as_are_read(method, runs):
    q, k, v = (torch.empty(1, 2, LAYOUT.tokens, 16, device="meta", dtype=torch.bfloat16) for _ in range(3))
    assert method.plan(q, k, v, LAYOUT, PlanMemory()).run_start.shape[-1] == runs


@pytest.mark.parametrize("length", [1, 2, 7, 64, 1000])
def test_running_sums_where_the_order_of_adding_must_not_change(length):
    x = torch.rand(2, 3, length, dtype=torch.float64)
    torch.testing.assert_close(sum_by_doubling(x), x.cumsum(-1))


def test_the_check_can_fail():
    with pytest.raises(RuntimeError, match="meta"):
        int(torch.empty(3, device="meta").sum())


def test_the_run_slots_of_an_accelerator_hold_every_selection():
    worst = torch.tensor([[True, False, True, False, True]])
    run_start, run_len = merge_segments(worst, torch.tensor([2, 3, 4, 5, 6]), max_runs=3)
    assert run_start.tolist() == [[0, 5, 14]] and run_len.tolist() == [[2, 4, 6]]
    assert merge_segments(worst.to("meta"), torch.empty(5, dtype=torch.int64, device="meta"))[0].shape == (1, 3)
