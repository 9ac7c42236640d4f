"""A tolerance: that what is measured of a selection is its error, and that the selection found has the error wanted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from clustered_tokens import FEW, LAYOUT, WITH_TEXT, clustered

import vidaccel.attention.clustering.tolerance as TOLERANCE
from vidaccel import Tangent, VideoLayout, sparse_attention
from vidaccel.attention import PlanMemory
from vidaccel.attention.clustering.tolerance import FALL, falling_slowly, within
from vidaccel.attention.groups import dense_attention


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
    assert (true < 1.4 * 0.05).all() and (true > 0.4 * 0.05).all()
    pairs = plan.selection[0].sum((1, 2, 3))
    assert pairs[2:].min() > 1.5 * pairs[:2].max()


def changing(sharper: list[float]):
    """Calls in which attention grows sharper, or less so."""
    layout = VideoLayout(4, 12, 12)
    q, k, v = clustered(layout, spread=0.6, dim=32)
    for factor in sharper:
        yield layout, q * factor, k, v


@pytest.mark.parametrize("tolerance", [0.1, 0.02])
@pytest.mark.parametrize("probed", [True, False])
def test_from_call_to_call_it_is_met_whatever_was_before(probed, tolerance):
    """Also after calls in which stand-ins were enough, and where attention is sharp and the estimate far too low."""
    memory, rows = PlanMemory(), []
    method = Tangent(q_clusters=16, k_clusters=24, probe=probed, tolerance=tolerance)
    for layout, q, k, v in changing([0.05, 0.05, 0.05, 1.0, 1.0, 3.0, 3.0, 8.0, 8.0, 1.0, *[0.05] * 26]):
        plan = method.plan(q, k, v, layout, memory)
        true = error_of(sparse_attention(q, k, v, plan), F.scaled_dot_product_attention(q, k, v), layout)
        assert (plan.details["predicted_error"] <= tolerance).all()
        assert (true < 1.8 * tolerance).all()
        rows.append(plan.density())
    assert rows[0] == rows[1] == rows[2] < 0.1 < rows[7]
    assert rows[-1] < 0.1
    assert memory.call["tangent_density"].shape == (2, 2)  # by head, as all that moves with heads between processes


@pytest.mark.parametrize("probed", [True, False])
def test_sharp_heads_take_some_pairs_and_not_all(probed):
    """The square of the mass that most clusters have there is 0 in float32: pairs would be of one rank."""
    torch.manual_seed(0)
    layout = VideoLayout(9, 8, 8)
    near = torch.randn(40, 64)[torch.randint(0, 40, (layout.tokens,))]
    x = torch.randn(1, 12, layout.tokens, 64) * 0.3 + near
    q, k, v = 4 * x, 4 * (x + 0.1 * torch.randn_like(x)), torch.randn_like(x)
    plan = Tangent(probe=probed, tolerance=0.05).plan(q, k, v, layout, PlanMemory())
    assert 0.1 < plan.density() < 0.7


def test_a_density_rises_at_once_and_falls_slowly():
    least, tolerance, power = torch.tensor([0.05]), 0.02, {"errors": 0.002}

    def error(density):
        return power["errors"] / density * (density < 1)

    def call(before):
        return falling_slowly(*within(tolerance, error, least, before), error, before)

    density, _ = within(tolerance, error, least, None)
    assert 0.09 < density < 0.12
    power["errors"] = 0.01  # as sharper attention has
    higher, _ = call(density)
    assert 0.45 < higher < 0.6
    power["errors"] = 0.002
    lower, found = call(higher)
    assert lower == FALL * higher and found == error(lower)  # what is told is the error of what is taken
    for _ in range(40):
        lower, _ = call(lower)
    assert 0.09 < lower < 0.12
    assert call(torch.ones(1))[0] < 0.12  # where nothing else had fitted


def test_a_call_with_nan_is_forgotten():
    memory, method = PlanMemory(), Tangent(**FEW, tolerance=0.05)
    q, k, v = clustered(LAYOUT, spread=0.8)
    broken = q.clone()
    broken[0, 0, 3, 2] = torch.nan
    method.plan(broken, k, v, LAYOUT, memory)
    plan = method.plan(q, k, v, LAYOUT, memory)
    true = error_of(sparse_attention(q, k, v, plan), F.scaled_dot_product_attention(q, k, v), LAYOUT)
    assert (true < 2 * 0.05).all()


@pytest.mark.parametrize("power", [0.3, 1.2, 3.0])
@pytest.mark.parametrize("start", [None, 0.06, 0.2, 0.9])
def test_it_finds_the_density_whatever_the_power_of_the_error(start, power):
    least = torch.tensor([0.05])
    before = None if start is None else torch.tensor([start])

    def error(density):
        return 0.3 * ((1 - density) / (1 - least)) * (density / least) ** -power

    grid = torch.linspace(0.05, 1, 10_000)
    smallest = grid[error(grid) <= 0.1][0].item()
    density, found = within(0.1, error, least, before)
    assert found.item() <= 0.1 and torch.equal(found, error(density))
    assert smallest * 0.999 < density.item() < 1.5 * smallest


@pytest.mark.parametrize(("error", "density"), [(0.02, 0.05), (0.5, 1.0)])
def test_stand_ins_alone_where_they_are_enough_and_all_pairs_where_nothing_is(error, density):
    found, left = within(0.1, lambda d: torch.where(d < 1, error, 0.0), torch.tensor([0.05]), torch.tensor([0.3]))
    assert found.item() == pytest.approx(density) and left.item() == pytest.approx(error if density < 1 else 0.0)


def test_what_it_costs_is_in_planning():
    layout = VideoLayout(9, 17, 23)
    density, tolerance = Tangent(density=0.2), Tangent(tolerance=0.02)
    more = tolerance.planning_pairs(layout) - density.planning_pairs(layout)
    assert more == pytest.approx(1.5 * 32 / layout.tokens)
    assert "measures the error on up to 1.4% of them" in tolerance.remark(layout)
    assert "measures" not in density.remark(layout)
    assert "measures" in replace(tolerance, probe=False).remark(layout)
