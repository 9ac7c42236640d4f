from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vidaccel import SVG2, BlockPlan, VideoLayout, sparse_attention
from vidaccel.attention import PlanMemory
from vidaccel.attention.clustering.clusters import cluster, renewed
from vidaccel.attention.clustering.probe import map_error
from vidaccel.attention.methods.base import OutOfReach
from vidaccel.attention.methods.svg2 import select_clusters

LAYOUT = VideoLayout(5, 8, 8)


@pytest.fixture
def golden():
    return load_file(Path(__file__).parents[1] / "data" / "svg2_selection.safetensors")


def selection(golden) -> torch.Tensor:
    return select_clusters(golden["q_centroids"], golden["k_centroids"], golden["k_sizes"], top_p=0.9, min_ratio=0.1)


def test_selection_is_that_of_the_published_implementation(golden):
    assert selection(golden).equal(golden["selected"])


@pytest.mark.parametrize("backend", ["reference", "gather", pytest.param("flex", marks=pytest.mark.compiler)])
def test_attention_from_the_selection_is_that_of_the_published_implementation(golden, backend):
    plan = BlockPlan.from_clusters(golden["q_sizes"], golden["k_sizes"], selection(golden)).validate()
    out = sparse_attention(golden["q"], golden["k"], golden["v"], plan, backend=backend)
    torch.testing.assert_close(out, golden["output"], atol=2e-6, rtol=1e-4)


def test_top_p_keeps_the_cluster_that_crosses_it():
    # masses .5, .3, .2 by equal scores and sizes 5, 3, 2
    sizes = torch.tensor([[[3, 5, 2]]])
    zeros = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 3, 4)
    kept = [select_clusters(*zeros, sizes, p, 0.0)[0, 0, 0].tolist() for p in (0.4, 0.6, 0.81)]
    assert kept == [[False, True, False], [True, True, False], [True, True, True]]


def test_min_ratio_keeps_the_best_whatever_the_mass():
    q, k = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 10, 4)
    q[..., 0], k[..., 3, 0] = 50.0, 50.0  # all mass on cluster 3
    sizes = torch.ones(1, 1, 10, dtype=torch.int64)
    assert select_clusters(q, k, sizes, 0.5, 0.0).sum() == 1
    kept = select_clusters(q, k, sizes, 0.5, 0.39)
    assert kept.sum() == 3 and kept[0, 0, 0, 3]


@pytest.mark.parametrize("layout", [LAYOUT, VideoLayout(5, 8, 8, 3, 9)])
@pytest.mark.parametrize("density", [0.15, 0.3, 0.5])
def test_the_density_asked_for_is_computed(layout, density):
    q, k, v = torch.randn(3, 2, 3, layout.tokens, 16)
    plan = SVG2(density=density).plan(q, k, v, layout, PlanMemory()).validate()
    assert plan.density() == pytest.approx(density, abs=0.02)


@pytest.mark.parametrize("scale", [2.0, 3.0, 6.0])
@pytest.mark.parametrize("compensate", [False, True])
def test_the_density_asked_for_is_computed_where_heads_are_sharp(scale, compensate):
    """A few clusters have all of the mass, as float32 adds it up: the others must not count as equally good."""
    torch.manual_seed(0)
    layout = VideoLayout(9, 8, 8)
    tokens = torch.randn(20, 64)[torch.randint(0, 20, (layout.tokens,))] + 0.3 * torch.randn(1, 4, layout.tokens, 64)
    q, k, v = scale * tokens, scale * tokens + 0.1 * torch.randn_like(tokens), torch.randn_like(tokens)
    plan = SVG2(density=0.4, compensate=compensate).plan(q, k, v, layout, PlanMemory()).validate()
    assert plan.density() == pytest.approx(0.4, abs=0.005)
    shares = plan.pairs().double().flatten() / layout.tokens**2
    assert (shares - 0.4).abs().max() < 0.15  # nor is what is left given to the first heads
    assert 0.99 < float(plan.details["top_p"]) <= 1


def test_a_density_reads_the_best_clusters_of_each_query():
    q, k, v = torch.randn(3, 2, 3, LAYOUT.tokens, 16)
    method = SVG2(density=0.3, q_clusters=8, k_clusters=16)
    plan = method.plan(q, k, v, LAYOUT, PlanMemory())
    for entry, top_p in enumerate(plan.details["top_p"].tolist()):
        one = replace(method, density=None, top_p=top_p + 1e-5, min_ratio=0.0)
        same = one.plan(*(x[entry : entry + 1] for x in (q, k, v)), LAYOUT, PlanMemory())
        assert plan.to_dense_mask()[entry].equal(same.to_dense_mask()[0])


def test_a_density_below_that_of_the_text_is_refused():
    said = (
        "density is 0.1, but the text, which stays dense, makes 0.306 of the pairs and one .*: raise density to 0.328"
    )
    with pytest.raises(OutOfReach, match=said) as refused:
        SVG2(density=0.1).check(VideoLayout(5, 8, 8, 0, 64))
    assert refused.value.eased_by == ()


def test_a_density_below_that_of_the_means_names_them_and_no_text_where_there_is_none():
    layout = VideoLayout(9, 8, 8)  # 43 clusters of 576 keys: 0.07465
    with pytest.raises(OutOfReach) as refused:
        SVG2(density=0.05, compensate=True).check(layout)
    assert str(refused.value) == (
        "SVG2 density is 0.05, but compensate=True, which reads the mean of each key cluster, makes 0.075 of the "
        "pairs: raise density to 0.075 or more, leave compensate out, or lower k_clusters."
    )
    assert refused.value.least == pytest.approx(43 / 576) and refused.value.eased_by == ("compensate", "k_clusters")
    SVG2(density=0.075, compensate=True).check(layout)  # as it was told
    SVG2(density=0.05).check(layout)
    SVG2(density=0.05, compensate=True, k_clusters=20).check(layout)
    with pytest.raises(OutOfReach, match=r"the text, which stays dense, makes 0\.306 of the pairs and compensate=True"):
        SVG2(density=0.32, compensate=True).check(VideoLayout(5, 8, 8, 0, 64))


def test_a_density_below_one_cluster_for_each_query_is_refused():
    """Which would be computed all the same, and told as if it were met."""
    layout = VideoLayout(9, 8, 8)  # 43 clusters of 576 keys, 13 in each
    with pytest.raises(OutOfReach, match="one key cluster for each query makes 0.023 of the pairs: raise") as refused:
        SVG2.for_density(layout, 0.0001)
    assert refused.value.least == pytest.approx(13 / 576) and refused.value.eased_by == ("k_clusters",)
    SVG2.for_density(layout, 0.023)
    SVG2.for_density(layout, 0.01, k_clusters=100)


def test_top_p_of_one_is_dense():
    q, k, v = torch.randn(3, 1, 2, LAYOUT.tokens, 16)
    assert SVG2(top_p=1.0).plan(q, k, v, LAYOUT, PlanMemory()).density() == pytest.approx(1.0, abs=1e-3)


def test_text_reads_and_is_read_by_everything():
    layout = VideoLayout(5, 8, 8, 3, 9)
    q, k, v = torch.randn(3, 1, 2, layout.tokens, 16)
    mask = SVG2(density=0.3).plan(q, k, v, layout, PlanMemory()).to_dense_mask()
    text = torch.ones(layout.tokens, dtype=torch.bool)
    text[layout.video] = False
    assert mask[:, :, text].all() and mask[..., text].all() and not mask.all()


def test_structure_in_the_tokens_is_found():
    """Queries and keys in groups, scattered over the sequence: at 30 % of the pairs nearly nothing is lost."""
    groups = torch.randint(0, 12, (LAYOUT.tokens,))
    centers = torch.randn(12, 32) * 3
    q, k = (centers[groups] + torch.randn(LAYOUT.tokens, 32) * 0.1 for _ in range(2))
    v = torch.randn(LAYOUT.tokens, 32)
    q, k, v = (x.expand(1, 1, -1, -1) for x in (q, k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    plan = SVG2(density=0.3, q_clusters=16, k_clusters=32).plan(q, k, v, LAYOUT, PlanMemory())
    error = (sparse_attention(q, k, v, plan) - dense).square().mean() / dense.square().mean()
    assert error < 1e-3


def test_warm_start_goes_on_from_the_last_step():
    q, k, v = torch.randn(3, 1, 2, LAYOUT.tokens, 16)
    memory = PlanMemory()
    method = SVG2()
    method.plan(q, k, v, LAYOUT, memory)
    first = {name: x.clone() for name, x in memory.call.items()}
    method.plan(q, k, v, LAYOUT, memory)
    assert set(first) == {"svg2_q", "svg2_k"}
    # Nothing changed in q and k, and k-means had converged or nearly so: the centroids stay close.
    for name, x in memory.call.items():
        assert (x - first[name]).abs().mean() < 0.05 * x.abs().mean()


@pytest.mark.parametrize(
    ("tokens", "expected"), [(75_600, (100, 495)), (8448, (36, 165)), (576, (36, 43)), (2, (2, 2))]
)
def test_cluster_counts_scale_with_the_sequence(tokens, expected):
    assert SVG2().cluster_counts(tokens) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"min_ratio": -0.1}, "min_ratio is -0.1"),
        ({"density": 2}, "density is 2"),
        ({"q_clusters": 0}, "q_clusters is 0"),
        ({"init_iterations": 0}, "init_iterations is 0"),
        ({"compensate": "false"}, "compensate is 'false': it must be True or False"),
        ({"min_ratio": "0.1"}, "min_ratio is '0.1': it must lie between 0 and 1"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        SVG2(**values)


def test_more_clusters_than_tokens_are_refused():
    with pytest.raises(ValueError, match="k_clusters is 1000, but there are only 320"):
        SVG2(k_clusters=1000).check(LAYOUT)


@pytest.mark.parametrize("layout", [LAYOUT, VideoLayout(5, 8, 8, 3, 9)], ids=["video", "text"])
@pytest.mark.parametrize("compensate", [False, True])
def test_routing_by_error_spends_the_density_and_is_nearer_to_dense(layout, compensate):
    torch.manual_seed(0)
    centres = torch.randn(12, 32) * 1.3
    picks = torch.randint(0, 12, (2, 3, layout.tokens))
    noise = torch.randn(3, 2, 3, layout.tokens, 32) * 0.8
    q, k, v = centres[picks] + noise[0], centres[picks.flip(2)] + noise[1], centres[picks.flip(2)].flip(-1) + noise[2]
    dense = sparse_attention(q, k, v, BlockPlan.dense(layout.tokens, layout.tokens))
    errors = {}
    for route in ("mass", "error"):
        method = SVG2(q_clusters=12, k_clusters=24, density=0.35, compensate=compensate, route=route)
        plan = method.plan(q, k, v, layout, PlanMemory()).validate()
        errors[route] = float((sparse_attention(q, k, v, plan) - dense).norm())
        if route == "error":
            assert (plan.pairs().double().mean(1) / layout.tokens**2 - 0.35).abs().max() < 0.01
            expected = 12 / 2 * layout.video_tokens / layout.tokens**2 if compensate else 0.0
            assert plan.details["planning_pairs"] == pytest.approx(expected)
            if not compensate:
                assert plan.run_len.sum(-1)[plan.tile_len > 0].min() > 0  # no query reads nothing
    if not layout.text_tokens:
        assert errors["error"] < errors["mass"]


def test_the_error_of_the_attention_map_written_out():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 90, 8)
    queries, keys = (renewed(x, cluster(x, n, 3, None)) for x, n in ((q, 4), (k, 7)))
    got = map_error(queries.means, k, keys, 0.5)
    for h in range(2):
        weights = (0.5 * queries.means[0, h].double() @ k[0, h].double().T).softmax(-1)
        of_mean = 0.5 * queries.means[0, h].double() @ keys.means[0, h].double().T
        of_mean = (
            of_mean - (0.5 * queries.means[0, h].double() @ k[0, h].double().T).logsumexp(-1, keepdim=True)
        ).exp()
        for j in range(7):
            members = keys.labels[0, h] == j
            expected = (weights[:, members] - of_mean[:, j : j + 1]).square().sum(-1)
            torch.testing.assert_close(got[0, h, :, j].double(), expected, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"route": "ear"}, 'route is \'ear\': choose "mass" or "error"'),
        ({"route": "error"}, 'route is "error" and density None: give the density to spend'),
    ],
)
def test_a_route_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        SVG2(**settings)
