"""A tolerance: that what is measured of a selection is its error, and that the selection found has the error wanted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from clustered_tokens import FEW, LAYOUT, WITH_TEXT, clustered

import vidaccel.attention.methods.tangent as METHOD
import vidaccel.attention.tolerance as TOLERANCE
from vidaccel import Tangent, VideoLayout, sparse_attention
from vidaccel.attention import PlanMemory
from vidaccel.attention.groups import dense_attention
from vidaccel.attention.tolerance import within


@pytest.fixture
def every_query(monkeypatch):
    monkeypatch.setattr(TOLERANCE, "ROWS", LAYOUT.video_tokens)


def error_of(out, dense, layout) -> torch.Tensor:
    out, dense = (x.double()[:, :, layout.video] for x in (out, dense))
    return (out - dense).flatten(1).norm(dim=-1) / dense.flatten(1).norm(dim=-1)


@pytest.mark.usefixtures("every_query")
@pytest.mark.parametrize("tolerance", [0.3, 0.05])
@pytest.mark.parametrize("probed", [True, False])
@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("layout", [LAYOUT, WITH_TEXT], ids=["video", "text"])
def test_on_every_query_it_is_the_error_of_the_output(layout, shared, probed, tolerance):
    q, k, v = clustered(layout, spread=0.8)
    k, v = (x[:, : x.shape[1] // shared] for x in (k, v))
    plan = Tangent(**{**FEW, "probe": probed}, tolerance=tolerance).plan(q, k, v, layout, PlanMemory())
    true = error_of(sparse_attention(q, k, v, plan), dense_attention(q, k, v), layout)
    torch.testing.assert_close(plan.details["predicted_error"].double(), true, rtol=1e-3, atol=1e-6)
    assert (true < 1.05 * tolerance).all()


@pytest.mark.parametrize("probed", [True, False])
@pytest.mark.parametrize("text", [0, 20])
def test_some_queries_tell_the_error_of_all(text, probed):
    layout = VideoLayout(6, 10, 10, text_after=text)
    q, k, v = clustered(layout, spread=0.8)
    dense = F.scaled_dot_product_attention(q, k, v)
    densities = []
    for tolerance in (0.06, 0.03, 0.015):
        plan = Tangent(q_clusters=20, k_clusters=30, probe=probed, tolerance=tolerance).plan(
            q, k, v, layout, PlanMemory()
        )
        assert (plan.details["predicted_error"] < 1.05 * tolerance).all()
        true = error_of(sparse_attention(q, k, v, plan), dense, layout)
        assert (true < 1.6 * tolerance).all()
        densities.append(plan.density())
    assert densities == sorted(densities) and densities[0] < densities[-1]


@pytest.mark.usefixtures("every_query")
def test_clusters_without_keys_leave_nothing_out():
    q, k, v = (torch.ones(1, 1, LAYOUT.tokens, 16) * x for x in (1.0, 2.0, 3.0))  # one point: most clusters are empty
    plan = Tangent(**FEW, tolerance=0.1).plan(q, k, v, LAYOUT, PlanMemory())
    assert (plan.details["predicted_error"] < 1e-5).all()
    torch.testing.assert_close(sparse_attention(q, k, v, plan), v)


def test_each_entry_of_a_batch_has_its_own():
    """One whose keys are hardly clustered needs more pairs than one whose keys are."""
    q, k, v = (torch.cat(x) for x in zip(clustered(LAYOUT, spread=0.2), clustered(LAYOUT, spread=1.0), strict=True))
    plan = Tangent(**FEW, tolerance=0.05).plan(q, k, v, LAYOUT, PlanMemory())
    true = error_of(sparse_attention(q, k, v, plan), F.scaled_dot_product_attention(q, k, v), LAYOUT)
    assert (true < 1.4 * 0.05).all() and (true > 0.6 * 0.05).all()
    pairs = plan.selection[0].sum((1, 2, 3))
    assert pairs[2:].min() > 1.5 * pairs[:2].max()


def test_later_calls_go_on_from_what_was_found(monkeypatch):
    q, k, v = clustered(LAYOUT, spread=0.8)
    memory, rounds = PlanMemory(), []

    def noted(tolerance, select, error, asked, count):
        rounds.append((count, asked.clone()))
        return within(tolerance, select, error, asked, count)

    monkeypatch.setattr(METHOD, "within", noted)
    method = Tangent(**FEW, tolerance=0.05)
    for _ in range(2):
        method.plan(q, k, v, LAYOUT, memory)
    (first, start), (later, kept) = rounds
    assert later < first and (start == 0.05).all()
    assert torch.equal(kept, memory.call["tangent_asked"][:, 0]) or not torch.equal(kept, start)
    assert memory.call["tangent_asked"].shape == (2, 2)  # by head, as all that moves with heads between processes


@pytest.mark.parametrize("factor", [0.2, 1.0, 6.0])
@pytest.mark.parametrize("power", [0.5, 1.0, 1.5])
def test_it_finds_what_to_ask_of_an_estimate_that_is_wrong(factor, power):
    """Of an estimate that is off by a factor, and by one that changes with the error."""
    found = within(0.05, lambda asked: asked, lambda asked: factor * asked**power, torch.tensor([0.05]), 8)
    torch.testing.assert_close(found[1], torch.tensor([0.05]), rtol=0.1, atol=0)


@pytest.mark.parametrize(("error", "bound"), [(0.0, 1), (1.0, 0)])
def test_an_error_that_cannot_be_reached_ends_at_a_bound(error, bound):
    selected, left, asked = within(
        0.05, lambda asked: asked, lambda asked: torch.full_like(asked, error), torch.tensor([0.05]), 20
    )
    assert asked.item() == pytest.approx(TOLERANCE.ASKED[bound]) and left.item() == error
    assert torch.equal(selected, asked)


def test_what_it_costs_is_in_planning():
    layout = VideoLayout(9, 17, 23)
    density, tolerance = Tangent(density=0.2), Tangent(tolerance=0.02)
    more = tolerance.planning_pairs(layout) - density.planning_pairs(layout)
    assert more == pytest.approx(1.5 * 32 / layout.tokens)
    assert "measures the error on 1.4% of them" in tolerance.remark(layout)
    assert "measures" not in density.remark(layout)
    assert "measures" in replace(tolerance, probe=False).remark(layout)
