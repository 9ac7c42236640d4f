"""Tangent: its definition written out in float64, its budget, what it promises, and that it beats what it replaces."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from clustered_tokens import FEW, LAYOUT, WITH_TEXT, clustered

import vidaccel.attention.clustering.probe as PROBES
import vidaccel.attention.clustering.spread as SPREADS
from vidaccel import METHODS, SVG2, DenseSchedule, Tangent, VideoLayout, sparse_attention
from vidaccel.attention import PlanMemory, SparseAttention, StepInfo
from vidaccel.attention.clustering.clusters import Clusters, cluster, renewed
from vidaccel.attention.clustering.kmeans import cluster_sizes, update
from vidaccel.attention.clustering.probe import probe, read
from vidaccel.attention.clustering.slopes import follow
from vidaccel.attention.clustering.spread import spread_of
from vidaccel.attention.methods.base import OutOfReach


def plan_of(q, k, v, layout, **settings):
    return Tangent(**{**FEW, **settings}).plan(q, k, v, layout, PlanMemory())


def written_out(q, k, v, plan, layout) -> torch.Tensor:
    """The definition in float64, query by query: what is read is itself, and each skipped cluster is its tangent, with
    the mass that the queries of the tile see on average; and its value moves with the query."""
    q, k, v = q.double(), k.double(), v.double()
    scale = q.shape[-1] ** -0.5
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            selected, sizes = (x[b, h] for x in plan.selection)
            clusters = plan.kv_order[b, h].split(sizes.tolist())
            tiles = plan.q_order[b, h].split(plan.tile_len[b, h].tolist())
            for tile, queries in enumerate(tiles):
                centroid = q[b, h, queries].mean(0)
                beyond = q[b, h, queries] - centroid
                for query in queries.tolist():
                    scores, values, moved = [], [], 0.0
                    whole = (k[b, h] @ centroid * scale).logsumexp(0)  # text and all
                    for j, keys in enumerate(clusters):
                        if selected[tile, j]:
                            scores.append(k[b, h, keys] @ q[b, h, query] * scale)
                            values.append(v[b, h, keys])
                        elif len(keys):
                            seen = k[b, h, keys] @ centroid * scale
                            weights = seen.softmax(0)
                            key, value = weights @ k[b, h, keys], weights @ v[b, h, keys]
                            curve = (beyond @ (k[b, h, keys] - k[b, h, keys].mean(0)).T * scale).square().mean() / 2
                            tangent = seen.logsumexp(0) + (q[b, h, query] - centroid) @ key * scale
                            scores.append((tangent + curve.log1p())[None])
                            values.append(value[None])
                            of_k, of_v = (x[b, h, keys] - x[b, h, keys].mean(0) for x in (k, v))
                            move = (q[b, h, query] - centroid) @ of_k.T @ of_v / len(keys) * scale
                            moved += (seen.logsumexp(0) - whole).exp() * move
                    out[b, h, query] = torch.cat(scores).softmax(0) @ torch.cat(values) + moved
    return out


@pytest.fixture
def all_tokens(monkeypatch):
    """Covariances are those of all tokens of a cluster, not of a sample."""
    monkeypatch.setattr(SPREADS, "SAMPLE", LAYOUT.tokens)


@pytest.mark.parametrize("layout", [LAYOUT, WITH_TEXT], ids=["video", "text"])
@pytest.mark.parametrize("backend", ["gather", "reference"])
def test_equals_its_definition(all_tokens, layout, backend):
    q, k, v = clustered(layout)
    plan = plan_of(q, k, v, layout, density=0.4).validate()
    out = sparse_attention(q, k, v, plan, backend=backend)
    torch.testing.assert_close(out.double(), written_out(q, k, v, plan, layout), atol=5e-6, rtol=5e-6)


def test_the_probe_with_clusters_of_any_size():
    """One giant cluster, small ones, an empty one, and scores that would overflow."""
    torch.manual_seed(1)
    k, v = torch.randn(2, 1, 2, 150, 8)
    k = k * 40
    labels = torch.full((1, 2, 150), 3)
    labels[..., :5], labels[..., 5:6] = 0, 1  # cluster 2 has none
    keys = Clusters(labels, cluster_sizes(labels, 4), update(k, labels, torch.zeros(1, 2, 4, 8)))
    centroids = torch.randn(1, 2, 3, 8)
    seen = probe(centroids, k, v, keys, scale=1.0)
    for j in range(4):
        members = labels[0, 0] == j
        scores = centroids.double() @ k[:, :, members].double().transpose(-1, -2)
        if not members.any():
            assert (seen.log_mass[..., j] == -torch.inf).all() and not seen.key[:, :, :, j].any()
            continue
        torch.testing.assert_close(seen.log_mass[..., j].double(), scores.logsumexp(-1), atol=1e-3, rtol=1e-5)
        weights = scores.softmax(-1)
        for table, x in ((seen.key, k), (seen.value, v)):
            expected = weights @ x[:, :, members].double()
            torch.testing.assert_close(table[:, :, :, j].double(), expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("layout", [LAYOUT, WITH_TEXT], ids=["video", "text"])
@pytest.mark.parametrize("density", [0.3, 0.55, 0.8])
def test_the_budget_is_met_to_a_pair_of_clusters(layout, density):
    """Stand-ins and text are in it, and it is spent over all heads of a batch entry together."""
    plan = plan_of(*clustered(layout), layout, density=density)
    per_entry = plan.pairs().double().mean(1) / layout.tokens**2
    largest = (plan.tile_len.max() * plan.selection[1].max()).item() / layout.tokens**2
    assert (per_entry - density).abs().max() <= largest / 2
    assert (plan.pairs()[:, 0] != plan.pairs()[:, 1]).any()  # a head that needs more gets more


def test_an_entry_does_not_depend_on_its_neighbours_in_the_batch():
    q, k, v = clustered(LAYOUT)
    both = plan_of(q, k, v, LAYOUT, density=0.4)
    alone = plan_of(q[1:], k[1:], v[1:], LAYOUT, density=0.4)
    assert torch.equal(both.selection[0][1:], alone.selection[0])


def test_all_pairs_are_dense_attention_and_equal_keys_are_exact_at_any_density():
    q, k, v = clustered(LAYOUT)
    dense = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(sparse_attention(q, k, v, plan_of(q, k, v, LAYOUT, density=1.0)), dense)
    # Twelve different tokens: every cluster holds copies of one.
    picks = torch.arange(LAYOUT.tokens) % 12
    q, k, v = (x[:, :, picks] for x in (q, k, v))
    plan = plan_of(q, k, v, LAYOUT, density=0.25, q_clusters=12)
    assert plan.density() < 0.3
    torch.testing.assert_close(
        sparse_attention(q, k, v, plan), F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-4
    )


def test_the_mass_that_stands_in_is_right_on_average():
    """The tangent alone, which a convex function is never below, claims too little."""
    q, k, v = clustered(LAYOUT, spread=1.0)
    plan = plan_of(q, k, v, LAYOUT, density=0.35)
    of_q, of_k = (cluster(x, count, 4, None) for x, count in ((q, 6), (k, 12)))
    curve = spread_of(q, k, v, of_q, of_k, 16**-0.5).curve
    alone = replace(plan, skipped=replace(plan.skipped, bias=plan.skipped.bias - curve))
    true = (q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5).logsumexp(-1)
    over, under = (sparse_attention(q, k, v, p, return_lse=True)[1].double() - true for p in (plan, alone))
    assert under.max() < 1e-5 and under.exp().mean() < 0.97
    assert abs(over.exp().mean() - 1) < 0.5 * (1 - under.exp().mean())


def test_queries_far_from_their_centroid_do_not_blow_a_stand_in_up():
    q, k, v = clustered(LAYOUT, spread=1.0)
    q = 8 * q
    dense = F.scaled_dot_product_attention(q, k, v)
    for probes in (True, False):
        plan = plan_of(q, k, v, LAYOUT, density=0.35, probe=probes)
        assert (sparse_attention(q, k, v, plan) - dense).norm() < 0.35 * dense.norm()


@pytest.mark.parametrize("density", [0.2, 0.35])
def test_it_is_nearer_to_dense_than_svg2_at_equal_density(density):
    layout = VideoLayout(8, 8, 8)
    q, k, v = clustered(layout, spread=0.8, dim=32)
    dense = F.scaled_dot_product_attention(q, k, v)

    def error(method) -> float:
        plan = method.plan(q, k, v, layout, PlanMemory())
        assert plan.density() == pytest.approx(density, abs=0.01)
        return float((sparse_attention(q, k, v, plan) - dense).norm() / dense.norm())

    ours = error(Tangent(density=density, probe=True))
    assert error(Tangent(density=density, probe=False)) < 0.95 * error(SVG2(density=density, compensate=True))
    assert ours < 0.6 * error(SVG2(density=density, compensate=True)) and ours < 0.6 * error(SVG2(density=density))


def test_labels_stay_between_two_clusterings_and_means_follow_the_tokens():
    q, k, v = clustered(LAYOUT)
    memory = PlanMemory()
    method = Tangent(**FEW, density=0.4, recluster_every=2)
    kept = []
    for _ in range(3):
        method.plan(q, k, v, LAYOUT, memory)
        kept.append([x.clone() for x in memory.call["tangent_k"]])
        k = k.flip(2)  # another step, with other tokens
    assert torch.equal(kept[0][0], kept[1][0]) and not torch.equal(kept[0][0], kept[2][0])
    assert not torch.equal(kept[0][1], kept[1][1])
    assert kept[0][0].dtype == torch.int16  # 40 layers of them are kept


def test_it_plans_without_reading_anything_on_the_host():
    layout = VideoLayout(3, 4, 5, text_before=2, text_after=3)
    q, k, v = (torch.empty(2, 3, layout.tokens, 16, device="meta", dtype=torch.bfloat16) for _ in range(3))
    for settings in ({"density": 0.8}, {"tolerance": 0.1}):
        memory = PlanMemory()
        for _ in range(3):
            plan = Tangent(q_clusters=5, k_clusters=9, init_iterations=3, probe=True, **settings).plan(
                q, k, v, layout, memory
            )
        assert plan.device.type == "meta" and plan.skipped.bias.shape == (2, 3, 6, 10)


@pytest.mark.parametrize(
    ("tokens", "expected"), [(75_600, (300, 495)), (8448, (66, 165)), (576, (36, 43)), (2, (2, 2))]
)
def test_cluster_counts_scale_with_the_sequence(tokens, expected):
    assert Tangent().cluster_counts(tokens) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.2, "tolerance": 0.1}, r"density 0\.2 and tolerance 0\.1: give one"),
        ({"density": 0.0}, "density is 0.0: it must be above 0"),
        ({"tolerance": 2.0}, "tolerance is 2.0: it must be above 0 and at most 1"),
        ({"k_clusters": 0}, "k_clusters is 0"),
        ({"recluster_every": 0}, "recluster_every is 0"),
        ({"probe": "no"}, "probe is 'no': it must be True, False or None"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Tangent(**settings)


def test_what_a_layout_does_not_allow():
    assert METHODS["tangent"] is Tangent and Tangent().density == 0.2
    one = r"density is 0\.05, but one stand-in for each key cluster makes 0\.071 of the pairs: raise density to 0\.072"
    with pytest.raises(OutOfReach, match=one + " or more, or lower k_clusters") as refused:
        Tangent(density=0.05, k_clusters=12).check(LAYOUT)
    assert refused.value.eased_by == ("k_clusters",) and refused.value.least == pytest.approx(12 / 168)
    Tangent(density=0.072, k_clusters=12).check(LAYOUT)  # as it was told: 0.071 would be refused again
    with pytest.raises(OutOfReach, match="the text, which stays dense, makes 0.089 of the pairs and one") as refused:
        Tangent(density=0.1, k_clusters=12).check(WITH_TEXT)
    assert refused.value.eased_by == ("k_clusters",)
    with pytest.raises(OutOfReach, match=r"raise density to \d\.\d+ or more\.$") as refused:  # no cluster would help
        Tangent(density=0.08, k_clusters=12).check(WITH_TEXT)
    assert refused.value.eased_by == ()
    with pytest.raises(ValueError, match="q_clusters is 1000, but there are only 168 video tokens"):
        Tangent(q_clusters=1000).check(LAYOUT)
    with pytest.raises(OutOfReach, match="k_clusters is 169"):
        Tangent(tolerance=0.1, k_clusters=169).check(LAYOUT)


def test_a_config_that_has_the_other_can_be_changed_as_the_message_says():
    """`replace` hands on a density that nobody gave."""
    for config, change in ((Tangent(), {"tolerance": 0.1}), (Tangent(tolerance=0.1), {"density": 0.3})):
        with pytest.raises(ValueError, match=r"set that to None: density=None, tolerance=0\.1, or") as caught:
            replace(config, **change)
        (name, value), *_ = change.items()
        other = "density" if name == "tolerance" else "tolerance"
        assert f"{other}=None, {name}={value}" in str(caught.value)
        assert replace(config, **{other: None}, **change) == Tangent(**change)


def test_for_density_leaves_the_density_to_a_tolerance():
    method = Tangent.for_density(LAYOUT, 0.01, tolerance=0.1)
    assert (method.density, method.tolerance) == (None, 0.1)
    assert Tangent.for_density(LAYOUT, 0.5, tolerance=None).density == 0.5
    with pytest.raises(OutOfReach, match=r"density is 0\.01"):
        Tangent.for_density(LAYOUT, 0.01)


def test_nan_is_refused_before_a_plan_is_made_of_it():
    q, k, v = clustered(LAYOUT)
    engine = SparseAttention(Tangent(**FEW, density=0.5), num_layers=1, schedule=DenseSchedule())
    engine.enter(StepInfo(), LAYOUT)
    q[0, 1, 7, 3] = float("nan")
    with pytest.raises(ValueError, match="1 of .* values of q are NaN or infinite in layer 0"):
        engine(q, k, v, 0)


@pytest.mark.parametrize("backend", ["gather", "reference"])
def test_gradients_take_selection_and_stand_ins_as_constants(backend):
    q, k, v = (x.double().requires_grad_() for x in clustered(LAYOUT))
    plan = plan_of(q, k, v, LAYOUT, density=0.4)
    tables = (plan.skipped.key, plan.skipped.value, plan.skipped.bias)
    assert not any(x.requires_grad for x in (*tables, plan.skipped.slope, plan.skipped.centre))
    got = torch.autograd.grad(sparse_attention(q, k, v, plan, backend=backend).square().sum(), (q, k, v))
    # Written out: every key a query reads, and the stand-ins as further keys.
    selected, sizes = plan.selection
    tile = plan.tile_of_token()
    rows = (torch.arange(2)[:, None, None], torch.arange(2)[None, :, None], tile)
    key, value, bias = (x.double()[rows] for x in tables)
    skipped = ~selected[rows] & (sizes > 0).unsqueeze(2)
    scale = q.shape[-1] ** -0.5
    read = (q @ k.transpose(-1, -2) * scale).masked_fill(~plan.to_dense_mask(), -torch.inf)
    stand_ins = (key @ q.unsqueeze(-1)).squeeze(-1) * scale + bias
    weights = torch.cat([read, stand_ins.masked_fill(~skipped, -torch.inf)], -1).softmax(-1)
    out = weights[..., : k.shape[2]] @ v + (weights[..., None, k.shape[2] :] @ value).squeeze(-2)
    beyond = q - plan.skipped.centre.double()[rows]
    out = out + (beyond.unsqueeze(-2) @ plan.skipped.slope.double()[rows]).squeeze(-2)
    expected = torch.autograd.grad(out.square().sum(), (q, k, v))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("layout", [LAYOUT, WITH_TEXT], ids=["video", "text"])
def test_without_a_probe_means_stand_in_and_the_budget_is_met(layout):
    q, k, v = clustered(layout)
    plan = plan_of(q, k, v, layout, density=0.3, probe=False).validate()
    assert not plan.skipped.of_each_tile and plan.details["probe"] is False and plan.details["planning_pairs"] == 0
    assert (plan.pairs().double().mean(1) / layout.tokens**2 - 0.3).abs().max() < 0.03
    keys = plan.kv_order[0, 0].split(plan.selection[1][0, 0].tolist())
    for table, x in ((plan.skipped.key, k), (plan.skipped.value, v)):
        for mean, members in zip(table[0, 0][:12], keys[:12], strict=True):
            torch.testing.assert_close(mean, x[0, 0, members].mean(0), atol=1e-5, rtol=1e-5)


def test_whether_it_probes_and_what_that_costs():
    short, longer = VideoLayout(9, 8, 8), VideoLayout(17, 8, 8)
    assert not Tangent().probes(short) and Tangent().probes(longer)
    assert Tangent(probe=True).probes(short) and not Tangent(probe=False).probes(longer)
    assert Tangent().planning_pairs(short) == 0
    assert Tangent(probe=True).planning_pairs(short) == pytest.approx(1.5 * 36 / 576)
    plan = plan_of(*clustered(WITH_TEXT), WITH_TEXT, density=0.5)
    assert plan.details["planning_pairs"] == pytest.approx(1.5 * 6 * 168 / 176**2) and plan.details["probe"]


@pytest.mark.parametrize("probes", [True, False])
@pytest.mark.parametrize("layout", [LAYOUT, WITH_TEXT], ids=["video", "text"])
def test_stand_ins_take_the_memory_that_is_said(layout, probes):
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (x.to(dtype) for x in clustered(layout))
        method = Tangent(**{**FEW, "probe": probes}, density=0.5)
        skipped = method.plan(q, k, v, layout, PlanMemory()).skipped
        tables = [skipped.key, skipped.value, skipped.bias, skipped.slope, *([skipped.centre] if probes else [])]
        made = sum(x.numel() * x.element_size() for x in tables)
        assert method.table_bytes(layout, 4, 16, dtype.itemsize) == made
        assert skipped.key.dtype == (dtype if probes else torch.float32)
    of_wan = Tangent().table_bytes(VideoLayout(21, 45, 80), 40, 128, 2)
    assert 3 * 2**30 < of_wan < 3.5 * 2**30
    assert 80 * Tangent().kept_bytes(VideoLayout(21, 45, 80), 40, 128) == pytest.approx(2.1 * 2**30, rel=0.02)


def test_half_precision_stays_near_the_definition():
    q, k, v = (x.bfloat16() for x in clustered(LAYOUT))
    plan = plan_of(q, k, v, LAYOUT, density=0.4)
    out = sparse_attention(q, k, v, plan)
    assert out.dtype == torch.bfloat16
    assert (out.double() - written_out(q, k, v, plan, LAYOUT)).abs().max() < 3e-2


def test_pieces_and_groups_of_clusters_make_the_same_probe(monkeypatch):
    """What a GPU does without a look at the sizes, and what the CPU does with one; a few heads at a time, too."""
    generator = torch.Generator().manual_seed(5)
    k, v = torch.randn(2, 2, 3, 150, 8, generator=generator) * 3
    labels = torch.randint(0, 6, (2, 3, 150), generator=generator) * (torch.arange(150) > 70)
    keys = Clusters(labels, cluster_sizes(labels, 7), update(k, labels, torch.zeros(2, 3, 7, 8)))
    centroids = torch.randn(2, 3, 5, 8, generator=generator)
    expected = probe(centroids, k, v, keys, 0.5, room=1)
    assert not expected.key[:, :, 5:].any() and not expected.value[..., 7:, :].any()
    for numbers in (2**25, 1):
        monkeypatch.setattr(PROBES, "NUMBERS", numbers)
        monkeypatch.setattr(PROBES, "on_the_host", lambda device: False)
        for one, other in zip(probe(centroids, k, v, keys, 0.5, room=1), expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        seen = read(expected)
        torch.testing.assert_close(seen.outputs, (seen.mass.unsqueeze(-2) @ expected.value[:, :, :5, :7]).squeeze(-2))
        monkeypatch.undo()


def test_the_spread_is_what_the_tokens_have(all_tokens, monkeypatch):
    q, k, v = clustered(LAYOUT)
    of_q, of_k = (cluster(x, count, 3, None) for x, count in ((q, 5), (k, 8)))
    of_q, of_k = renewed(q, of_q), renewed(k, of_k)
    for from_zero in (False, True):
        got = spread_of(q, k, v, of_q, of_k, 0.25, from_zero)
        for i in range(5):
            for j in range(8):
                some = q[1, 0, of_q.labels[1, 0] == i] - (0 if from_zero else of_q.means[1, 0, i])
                members = of_k.labels[1, 0] == j
                scores = 0.25 * some @ (k[1, 0, members] - of_k.means[1, 0, j]).T
                values = v[1, 0, members] - v[1, 0, members].mean(0)
                moved = scores @ values / max(1, len(values))  # [queries, channels]
                for found, expected in (
                    (got.score, scores.square().mean()),
                    (got.value, moved.square().sum(-1).mean()),
                ):
                    torch.testing.assert_close(found[1, 0, i, j], expected.nan_to_num(), atol=1e-5, rtol=1e-4)
                move = 0.25 * (k[1, 0, members] - of_k.means[1, 0, j]).T @ values / max(1, len(values))
                torch.testing.assert_close(got.moves[1, 0, j], move, atol=1e-5, rtol=1e-4)
    whole = spread_of(q, k, v, of_q, of_k, 0.25)
    monkeypatch.setattr(SPREADS, "SAMPLE", 16)
    sampled = spread_of(q, k, v, of_q, of_k, 0.25)
    for one, other in zip(sampled, whole, strict=True):
        assert 0.5 < one.norm() / other.norm() < 2


def test_under_autocast_slopes_follow_the_queries_as_they_are():
    q, k, v = clustered(LAYOUT)
    q = 8 * q  # far from their centroids: rounded, they would be further off than what autocast does to attention
    plan = plan_of(q, k, v, LAYOUT)
    with torch.autocast("cpu", torch.bfloat16):
        for backend in ("gather", "masked"):
            out = sparse_attention(q, k, v, plan, backend=backend)
            expected = sparse_attention(
                q, k, v, replace(plan, skipped=replace(plan.skipped, slope=None, centre=None)), backend=backend
            )
            moved = follow(torch.zeros_like(q), q, plan)
            torch.testing.assert_close(out - expected, moved, atol=1e-4, rtol=1e-4)
