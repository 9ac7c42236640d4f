"""Centroid compensation: against its definition written out, exact where it must be, and of use."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from vidaccel import SVG2, BlockPlan, Tangent, VideoLayout, sparse_attention
from vidaccel.attention import METHODS, PlanMemory
from vidaccel.attention.backends import gather
from vidaccel.attention.skipped import SkippedClusters

LAYOUT = VideoLayout(4, 6, 6)
SETTINGS = {"q_clusters": 6, "k_clusters": 12, "init_iterations": 4}


def clustered(layout: VideoLayout, spread: float, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v `[2, 2, N, 16]` in float32 around a few centers."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 2, layout.tokens, 16)
    centers = torch.randn(10, 16, generator=generator) * 2
    picks = torch.randint(0, 10, shape[:3], generator=generator)
    noise = torch.randn(3, *shape, generator=generator)
    return [centers[picks] + spread * noise[0], centers[picks.flip(2)] + spread * noise[1], noise[2]]


def plan_of(q, k, v, layout, **settings) -> BlockPlan:
    return SVG2(**{**SETTINGS, **settings}).plan(q, k, v, layout, PlanMemory())


def written_out(q, k, v, plan: BlockPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition in float64: each key is itself where it is read, and the mean of its cluster where it is not."""
    read = plan.to_dense_mask().expand(*q.shape[:2], -1, -1)
    order = plan.kv_order.expand(*k.shape[:2], -1)
    sizes = plan.selection[1].expand(*k.shape[:2], -1)
    q, k, v = q.double(), k.double(), v.double()
    means = [torch.empty_like(k), torch.empty_like(v)]
    for b in range(k.shape[0]):
        for h in range(k.shape[1]):
            for members in order[b, h].split(sizes[b, h].tolist()):
                for mean, x in zip(means, (k, v), strict=True):
                    mean[b, h, members] = x[b, h, members].mean(0)
    scale = q.shape[-1] ** -0.5
    scores = torch.where(read, q @ k.transpose(-1, -2), q @ means[0].transpose(-1, -2)) * scale
    weights = scores.softmax(-1)
    out = (weights * read) @ v + (weights * ~read) @ means[1]
    return out, scores.logsumexp(-1)


@pytest.mark.parametrize("layout", [LAYOUT, VideoLayout(4, 6, 6, text_before=3, text_after=5)])
@pytest.mark.parametrize("backend", ["gather", "masked", "reference", "auto"])
def test_equals_attention_to_the_means_of_what_is_skipped(layout, backend):
    q, k, v = clustered(layout, 0.5)
    plan = plan_of(q, k, v, layout, density=0.45, compensate=True)
    expected, sums = written_out(q, k, v, plan)
    out, lse = sparse_attention(q, k, v, plan, backend=backend, return_lse=True)
    torch.testing.assert_close(out.double(), expected, atol=3e-6, rtol=3e-6)
    torch.testing.assert_close(lse.double(), sums, atol=3e-6, rtol=3e-6)


def test_half_precision_keeps_its_dtype():
    q, k, v = (x.bfloat16() for x in clustered(LAYOUT, 0.5))
    plan = plan_of(q, k, v, LAYOUT, density=0.45, compensate=True)
    out = sparse_attention(q, k, v, plan)
    assert out.dtype == torch.bfloat16
    assert (out.double() - written_out(q, k, v, plan)[0]).abs().max() < 2e-2


def test_dense_attention_comes_out_when_the_keys_of_a_cluster_are_equal():
    q, _, v = clustered(LAYOUT, 0.5)
    k = clustered(LAYOUT, 0.0)[1]
    plan = plan_of(q, k, v, LAYOUT, k_clusters=40, init_iterations=30, density=0.5, compensate=True)
    dense = F.scaled_dot_product_attention(q, k, v)
    error = (sparse_attention(q, k, v, plan) - dense).abs().max()
    # Values of a cluster have equal weights too, so that their mean stands for them exactly.
    assert plan.density() < 0.6 and error < 1e-5


def test_a_query_that_reads_everything_is_left_as_it_is():
    q, k, v = clustered(LAYOUT, 0.5)
    plan = plan_of(q, k, v, LAYOUT, top_p=1.0, min_ratio=1.0, compensate=True)
    dense = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(sparse_attention(q, k, v, plan), dense, atol=1e-5, rtol=1e-5)


def test_it_lowers_the_error_at_equal_density():
    layout, errors = VideoLayout(8, 8, 8), {False: 0.0, True: 0.0}
    for seed in range(4):
        q, k, v = clustered(layout, 0.3, seed)
        dense = F.scaled_dot_product_attention(q, k, v)
        for compensate in errors:
            plan = plan_of(q, k, v, layout, k_clusters=20, density=0.3, compensate=compensate)
            assert plan.density() == pytest.approx(0.3, abs=0.02)
            errors[compensate] += float((sparse_attention(q, k, v, plan) - dense).norm())
    assert errors[True] < 0.8 * errors[False]


def test_the_density_counts_one_key_for_each_skipped_cluster():
    sizes = torch.tensor([[[3, 5, 0, 2]]])
    selected = torch.tensor([[[[True, False, False, False], [True, True, False, True]]]])
    plan = BlockPlan.from_clusters(torch.tensor([[[4, 6]]]), sizes, selected)
    means = torch.zeros(1, 1, 4, 8)
    with_means = BlockPlan(
        **{f: getattr(plan, f) for f in ("n_q", "n_kv", "tile_start", "tile_len", "run_start", "run_len", "selection")},
        skipped=SkippedClusters(means, means),
    )
    assert plan.pairs().item() == 4 * 3 + 6 * 10
    assert with_means.pairs().item() == 4 * (3 + 2) + 6 * 10  # the empty cluster has no mean
    assert with_means.to("cpu").skipped is not None


def test_means_without_a_selection_are_refused():
    dense = BlockPlan.dense(4, 4)
    means = torch.zeros(1, 1, 1, 8)
    with pytest.raises(ValueError, match="from_clusters"):
        BlockPlan(
            4,
            4,
            dense.tile_start,
            dense.tile_len,
            dense.run_start,
            dense.run_len,
            skipped=SkippedClusters(means, means),
        )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("layout", [VideoLayout(9, 8, 8), VideoLayout(13, 8, 8, 0, 5)], ids=["video", "text"])
def test_every_method_says_what_stands_for_skipped_keys_and_what_it_takes(name, layout):
    """Front ends ask before a run: which backends will do, and how much memory to make room for."""
    changes = [{"density": 0.5, "compensate": compensate} for compensate in (False, True)] if name == "svg2" else [{}]
    for change in changes:
        method = METHODS[name](**change)
        q, k, v = torch.randn(3, 1, 2, layout.tokens, 16)
        memory = PlanMemory()
        skipped = method.plan(q, k, v, layout, memory).skipped
        kept = [x for x in tree_leaves(memory.call) if isinstance(x, torch.Tensor)]
        assert method.kept_bytes(layout, 2, 16) == sum(x.nbytes for x in kept)
        assert method.stands_in == (skipped is not None)
        tables = [] if skipped is None else [x for x in vars(skipped).values() if x is not None]
        assert method.table_bytes(layout, 2, 16, 4) == sum(x.numel() * x.element_size() for x in tables)


def test_a_density_that_the_means_alone_exceed_is_refused():
    with pytest.raises(ValueError, match="mean of each key cluster, makes 0.* raise density"):
        SVG2(k_clusters=72, density=0.4, compensate=True).check(LAYOUT)


def test_gradients_reach_the_queries_through_both_parts():
    q, k, v = clustered(LAYOUT, 0.5)
    q.requires_grad_()
    with torch.no_grad():
        plan = plan_of(q, k, v, LAYOUT, density=0.45, compensate=True)
    (ours,) = torch.autograd.grad(sparse_attention(q, k, v, plan).square().sum(), q)
    (theirs,) = torch.autograd.grad(written_out(q, k, v, plan)[0].square().sum(), q)
    torch.testing.assert_close(ours, theirs.float(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("own", "biased"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    ("backend", "slow"),
    [("gather", False), ("gather", True), ("masked", False)],
    ids=["gather", "gather where few rows are slow", "masked"],
)
def test_the_cpus_backends_agree_with_the_reference_on_ragged_and_empty_clusters(
    backend, slow, own, biased, monkeypatch
):
    """Tables for all tiles, also with a bias of each, or for each; a tile that reads no token, one that skips nothing,
    clusters without any."""
    monkeypatch.setattr(gather, "_few_rows_are_slow", lambda: slow)
    generator = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 2, 3, 90, 16, generator=generator, dtype=torch.float64)
    q_sizes = torch.tensor([40, 0, 3, 46, 1]).expand(2, 3, -1)
    k_sizes = torch.tensor([1, 30, 0, 50, 9, 0]).expand(2, 3, -1)
    selected = torch.rand(2, 3, 5, 6, generator=generator) < 0.4
    selected[:, :, 2], selected[:, :, 3] = False, True
    orders = torch.rand(2, 2, 3, 90, generator=generator).argsort(-1)
    plan = BlockPlan.from_clusters(q_sizes, k_sizes, selected, orders[0], orders[1])
    shape = (2, 3, 5, 6, 16) if own else (2, 3, 6, 16)
    tables = torch.randn(2, *shape, generator=generator)
    bias = torch.randn(2, 3, 5, 6, generator=generator) if biased else None
    plan = replace(plan, skipped=SkippedClusters(*tables, bias))
    expected, sums = sparse_attention(q, k, v, plan, backend="reference", return_lse=True)
    out, lse = sparse_attention(q, k, v, plan, backend=backend, return_lse=True)
    # The reference merges the stand-ins' part, which is computed in float32.
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(lse, sums, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(sparse_attention(q, k, v, plan, backend=backend), expected, atol=2e-6, rtol=2e-6)
    half = sparse_attention(*(x.bfloat16() for x in (q, k, v)), plan, backend=backend)
    assert half.dtype == torch.bfloat16 and (half - expected).abs().max() < 3e-2


def one_plan_with_tables(lead, tables, own):
    """Clusters of one order, selected for `lead`, with stand-ins for `tables` batch entries and heads."""
    sizes = torch.tensor([20, 0, 30, 20])
    selected = torch.rand(*lead, 4, 4) < 0.5
    selected[..., 0] = True
    plan = BlockPlan.from_clusters(sizes.expand(*lead, 4), sizes.expand(*lead, 4), selected, n_q=70, n_kv=70)
    shape = (*tables, 4, 4) if own else (*tables, 4)
    bias = torch.randn(shape) if own else None
    return replace(plan, skipped=SkippedClusters(torch.randn(*shape, 16), torch.randn(*shape, 16), bias))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("backend", ["gather", "masked"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_autocast_rounds_no_more_than_q_k_and_v(dtype, bound, backend, own):
    """The bias of stand-ins, which grows with the clusters, and scores that are written out keep float32."""
    plan = one_plan_with_tables((1, 3), (2, 3), own)
    if own:
        plan.skipped.bias.add_(5)
    inputs = [torch.randn(2, 3, 70, 16).to(dtype).float() for _ in range(3)]
    ours, exact = ([x.detach().to(kind).requires_grad_() for x in inputs] for kind in (torch.float32, torch.float64))
    expected = sparse_attention(*exact, plan, backend="reference")
    with torch.autocast("cpu", dtype):
        out = sparse_attention(*ours, plan, backend=backend)
        plain = sparse_attention(*(x.detach() for x in ours), plan, backend=backend)
        half = sparse_attention(*(x.detach().to(dtype) for x in ours), plan, backend=backend)
    assert out.dtype == plain.dtype == torch.float32 and half.dtype == dtype
    for made in (out, plain, half):
        assert (made - expected).norm() < bound * expected.norm()
    weights = torch.randn(expected.shape)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for x, y in zip(ours, exact, strict=True):
        assert (x.grad - y.grad).norm() < 3 * bound * y.grad.norm()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("lead", "tables"), [((1, 1), (2, 3)), ((1, 3), (2, 3)), ((2, 3), (1, 1)), ((2, 3), (2, 1))])
def test_tables_for_fewer_or_more_than_the_plan_is_for(lead, tables, own):
    plan = one_plan_with_tables(lead, tables, own)
    q, k, v = (torch.randn(2, 3, 70, 16, dtype=torch.float64) for _ in range(3))
    label = torch.arange(4).repeat_interleave(torch.tensor([20, 0, 30, 20]))
    key, value = (x.double().expand(2, 3, *x.shape[2:]) for x in (plan.skipped.key, plan.skipped.value))
    if not own:
        key, value = (x.unsqueeze(2).expand(-1, -1, 4, -1, -1) for x in (key, value))
    scores = (q @ k.transpose(-1, -2) / 4).masked_fill(~plan.to_dense_mask().expand(2, 3, -1, -1), -torch.inf)
    extra = torch.einsum("bhnd,bhncd->bhnc", q, key[:, :, label]) / 4
    extra = extra + plan.stand_in_bias().double().expand(2, 3, -1, -1)[:, :, label]
    weights = torch.cat([scores, extra], -1).softmax(-1)
    expected = weights[..., :70] @ v + torch.einsum("bhnc,bhncd->bhnd", weights[..., 70:], value[:, :, label])
    for backend in ("gather", "masked", "reference"):
        out = sparse_attention(q, k, v, plan, backend=backend)
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6, msg=lambda m, b=backend: f"{b}: {m}")


@pytest.mark.parametrize("lead", [(2, 3), (1, 3), (2, 1)])
def test_a_bias_for_more_heads_or_batch_entries_than_the_keys(lead):
    plan = one_plan_with_tables((1, 1), (1, 1), False)
    plan = replace(plan, skipped=replace(plan.skipped, bias=torch.randn(*lead, 4, 4)))
    same = replace(
        plan.skipped, key=plan.skipped.key.expand(*lead, -1, -1), value=plan.skipped.value.expand(*lead, -1, -1)
    )
    inputs = torch.randn(3, 2, 3, 70, 16).unbind(0)
    expected = sparse_attention(*inputs, replace(plan, skipped=same), backend="reference")
    for backend in ("gather", "masked", "reference"):
        torch.testing.assert_close(sparse_attention(*inputs, plan, backend=backend), expected, atol=1e-5, rtol=1e-5)


def test_a_bias_that_fits_neither_keys_nor_queries_is_refused():
    plan = one_plan_with_tables((1, 1), (1, 3), False)
    with pytest.raises(ValueError, match=r"keys for \[1, 3\] and a bias for \[2, 2\] batch entries and heads"):
        replace(plan.skipped, bias=torch.randn(2, 2, 4, 4))
    with pytest.raises(ValueError, match=r"got \[1, 3, 4, 16\], \[1, 3, 4, 16\] and \[4\]"):
        replace(plan.skipped, bias=torch.randn(4))
    of_five = replace(plan, skipped=replace(plan.skipped, bias=torch.randn(5, 1, 4, 4)))
    q = torch.randn(2, 3, 70, 16)
    with pytest.raises(ValueError, match="for 5 batch entries and 3 heads of 16 channels, but q has 2, 3 and 16"):
        sparse_attention(q, q, q, of_five)


@pytest.mark.parametrize("backend", ["gather", "masked", "reference"])
def test_gradients_of_queries_that_skip_nothing(backend):
    """Text reads everything, so it has no stand-in."""
    layout = VideoLayout(4, 4, 5, text_after=3)
    q, k, v = (torch.randn(1, 2, layout.tokens, 16) for _ in range(3))
    plan = Tangent(density=0.7, probe=True, q_clusters=8, k_clusters=10).plan(q, k, v, layout, PlanMemory())
    tensors = [x.requires_grad_() for x in (q, k, v)]
    gradients = torch.autograd.grad(sparse_attention(*tensors, plan, backend=backend).square().sum(), tensors)
    assert all(x.isfinite().all() for x in gradients)


def test_tables_that_lie_side_by_side_are_one():
    pairs = torch.randn(1, 2, 5, 3, 16).transpose(2, 3)
    bias = torch.zeros(1, 2, 3, 5)
    together = SkippedClusters(pairs[..., :8], pairs[..., 8:], bias)
    assert together.side_by_side().equal(pairs)
    for key, value in ((pairs[..., 8:], pairs[..., :8]), (pairs[..., :8].clone(), pairs[..., 8:])):
        assert SkippedClusters(key, value, bias).side_by_side() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {"key": s.key[:, :, :-1], "value": s.value[:, :, :-1], "bias": s.bias[..., :-1]},
            "has 6 tiles and 12",
        ),
        (lambda s: {"bias": s.bias[:, :, :-1]}, r"a bias for \[5, 12\]"),
        (lambda s: {"slope": torch.cat([s.slope, s.slope[:, :, :1]], 2), "centre": None}, "and 7 slopes"),
    ],
)
@pytest.mark.parametrize("probed", [False, True])
def test_tables_of_another_plan_are_refused(change, message, probed):
    """The kernels would read beyond them."""
    q, k, v = clustered(LAYOUT, 0.5)
    plan = Tangent(**SETTINGS, probe=probed, density=0.4).plan(q, k, v, LAYOUT, PlanMemory())
    if probed and "key" in change(plan.skipped):
        less = (x[:, :, :, :-1] for x in (plan.skipped.key, plan.skipped.value))
        wrong = replace(plan.skipped, **dict(zip(("key", "value"), less, strict=True)))
        message = r"keys for \[6, 11\]"
    else:
        wrong = replace(plan.skipped, **change(plan.skipped))
    with pytest.raises(ValueError, match=message):
        replace(plan, skipped=wrong)


def test_tables_of_other_channels_or_heads_are_refused():
    q, k, v = clustered(LAYOUT, 0.5)
    plan = plan_of(q, k, v, LAYOUT, compensate=True)
    narrow = replace(plan.skipped, key=plan.skipped.key[..., :8], value=plan.skipped.value[..., :8])
    with pytest.raises(ValueError, match="for 2 batch entries and 2 heads of 8 channels, but q has 2, 2 and 16"):
        sparse_attention(q, k, v, replace(plan, skipped=narrow))
