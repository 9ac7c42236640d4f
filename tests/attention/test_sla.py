"""SLA: against the published implementation, formulas written out, gradients in float64, and its bounds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from vidaccel import METHODS, SLA, DenseSchedule, SparseAttention, VideoLayout
from vidaccel.attention import PlanMemory, StepInfo

DATA = Path(__file__).parents[1] / "data"
GOLDEN = ("sla_all_relu_ragged300", "sla_noncritical_elu_k1of4")
TOLERANCE = {"atol": 2e-5, "rtol": 0.0}


def attention(method, q, k, v, projection, layout=None, backend="auto"):
    """A call through an engine, as a model makes it."""
    engine = SparseAttention(method, num_layers=1, backend=backend)
    engine.enter(StepInfo(), layout or VideoLayout(1, 1, q.shape[2]))
    return engine(q, k, v, 0, weights=projection)


@pytest.mark.parametrize("backend", ["masked", "gather", "reference"])
@pytest.mark.parametrize("name", GOLDEN)
def test_outputs_and_gradients_of_the_published_implementation(name, backend):
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        facts, tensors = file.metadata(), {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    method = SLA(
        topk=float(facts["topk"]),
        block=(int(facts["block_q"]), int(facts["block_k"])),
        linear_scope=facts["linear_scope"],
        feature_map=facts["feature_map"],
    )
    q, k, v = (tensors[x].requires_grad_() for x in "qkv")
    assert torch.equal(method.block_masks(q, k)[0], tensors["block_map"].bool())
    projection = nn.Linear(64, 64)
    with torch.no_grad():
        projection.weight.copy_(tensors["proj_weight"])
        projection.bias.copy_(tensors["proj_bias"])
    out = attention(method, q, k, v, projection, backend=backend)
    torch.testing.assert_close(out, tensors["out"], **TOLERANCE)
    (out * tensors["dout"]).sum().backward()
    for x, wanted in zip((q, k, v), ("dq", "dk", "dv"), strict=True):
        torch.testing.assert_close(x.grad, tensors[wanted], **TOLERANCE)
    torch.testing.assert_close(projection.weight.grad, tensors["dproj_weight"], **TOLERANCE)
    torch.testing.assert_close(projection.bias.grad, tensors["dproj_bias"], **TOLERANCE)


PHI = {"softmax": lambda x: x.softmax(-1), "elu": lambda x: F.elu(x) + 1, "relu": F.relu}


def written_out(method, q, k, v, projection):
    """The output of one head in the video, query by query, from the definition in the docstring."""
    centred = k - k.mean(0)
    groups = [torch.arange(len(x)).split(size) for x, size in zip((q, k), method.block, strict=True)]
    count = len(groups[1])
    phi, rows = PHI[method.feature_map], []
    for queries in groups[0]:
        scores = torch.stack([q[queries].mean(0) @ centred[keys].mean(0) for keys in groups[1]])
        order = scores.sort(descending=True, stable=True).indices.tolist()
        read = order[: max(1, int(method.topk * count))]
        lowest = order[max(len(read), count - int((method.skip or 0) * count)) :]
        linear = {
            "all": range(count),
            "non_critical": [j for j in range(count) if j not in read],
            "marginal": [j for j in range(count) if j not in [*read, *lowest]],
            "none": [],
        }[method.linear_scope]
        for i in queries.tolist():
            chosen = torch.cat([groups[1][j] for j in read])
            row = ((q[i] @ k[chosen].T) / q.shape[-1] ** 0.5).softmax(0) @ v[chosen]
            if method.linear_scope != "none":
                known = torch.cat([groups[1][j] for j in linear]) if len(linear) else torch.arange(0)
                weights = phi(k[known]) @ phi(q[i])
                total = weights.sum() + method.added_eps
                mean = weights @ v[known] / total if total > 0 else torch.zeros_like(row)
                row = row + projection(mean)
            rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("text", [(0, 0), (3, 0), (0, 5), (2, 4)])
@pytest.mark.parametrize("scope", ["all", "non_critical", "marginal", "none"])
@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
def test_the_formula_with_an_odd_number_of_tokens_and_text_on_any_side(text, scope, feature_map):
    layout = VideoLayout(3, 3, 7, text_before=text[0], text_after=text[1])
    torch.manual_seed(2)
    q, k, v = torch.randn(3, 2, 2, layout.tokens, 8, dtype=torch.float64)
    skip = {"skip": 0.3} if scope == "marginal" else {}
    method = SLA(topk=0.3, block=(16, 8), linear_scope=scope, feature_map=feature_map, **skip)
    projection = nn.Linear(8, 8, dtype=torch.float64)
    out = attention(method, q, k, v, projection, layout)
    video = layout.video
    none = SLA(topk=0.3, block=(16, 8), linear_scope="none")
    sparse = attention(none, q, k, v, None, layout)
    dense = F.scaled_dot_product_attention(q, k, v)
    for rows in (slice(0, video.start), slice(video.stop, None)):  # text reads everything, and gets nothing added
        torch.testing.assert_close(out[:, :, rows], dense[:, :, rows])
    for b in range(2):
        for h in range(2):
            args = (x[b, h, video] for x in (q, k, v))
            wanted = written_out(method, *args, projection)
            if any(text):  # video tokens read the text beside their blocks, in one softmax
                wanted += sparse[b, h, video] - written_out(none, *(x[b, h, video] for x in (q, k, v)), None)
            torch.testing.assert_close(out[b, h, video], wanted)


@pytest.mark.parametrize("scope", ["all", "non_critical", "marginal", "none"])
def test_gradients_of_everything_in_float64(scope):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 21, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    method = SLA(topk=0.34, block=(5, 4), linear_scope=scope)
    layout = VideoLayout(1, 3, 6, text_before=1, text_after=2)

    def whole(q, k, v, weight, bias):
        return attention(method, q, k, v, lambda linear: F.linear(linear, weight, bias), layout)

    assert torch.autograd.gradcheck(whole, (q, k, v, weight, bias))


def test_one_key_block_of_the_demo_s_576_tokens():
    layout = VideoLayout(9, 8, 8)
    q, k, v = torch.randn(3, 1, 3, 576, 64)
    method = SLA(topk=1 / 18, block=(32, 32))
    plan = method.plan(q, k, v, layout, PlanMemory()).validate()
    assert plan.density() == pytest.approx(1 / 18) == method.expected_density(layout)
    assert (plan.to_dense_mask().sum(-1) == 32).all()
    assert SLA(topk=2 / 18, block=(32, 32)).blocks_read(576) == 2
    projection = nn.Linear(64, 64)
    nn.init.zeros_(projection.weight)
    nn.init.zeros_(projection.bias)
    out = attention(method, q, k, v, projection, layout)
    sparse = attention(SLA(topk=1 / 18, block=(32, 32), linear_scope="none"), q, k, v, None, layout)
    assert torch.equal(out, sparse)  # as training starts


def test_a_topk_of_less_than_one_block_reads_one_and_says_so():
    layout = VideoLayout(4, 4, 8)
    method = SLA(topk=0.1, linear_scope="none")
    q, k, v = torch.randn(3, 1, 2, 128, 8)
    engine = SparseAttention(method, num_layers=1)
    engine.enter(StepInfo(), layout)
    assert torch.isfinite(engine(q, k, v, 0)).all()
    assert "SLA topk 0.1 of 2 key blocks is less than one: each query block reads one" in engine.report().notes
    assert not SLA(topk=0.5).remark(layout)


def test_a_skip_of_nothing_leaves_all_that_is_not_critical():
    q, k, v = torch.randn(3, 1, 2, 100, 8, dtype=torch.float64)
    projection = nn.Linear(8, 8, dtype=torch.float64)
    made = [
        attention(SLA(topk=0.2, block=(16, 8), **more), q, k, v, projection)
        for more in ({"linear_scope": "marginal", "skip": 0.0}, {"linear_scope": "non_critical"})
    ]
    assert torch.equal(*made)


@pytest.mark.parametrize("scope", ["all", "non_critical"])
def test_grouped_heads_and_tables_cut_into_pieces(scope, monkeypatch):
    from vidaccel.attention.methods import sla

    torch.manual_seed(1)
    q = torch.randn(2, 6, 50, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 3, 50, 8, dtype=torch.float64)
    projection = nn.Linear(8, 8, dtype=torch.float64)
    method = SLA(topk=0.3, block=(8, 8), linear_scope=scope)
    whole = attention(method, q, k, v, projection)
    repeated = attention(method, q, *(x.repeat_interleave(2, 1) for x in (k, v)), projection)
    torch.testing.assert_close(whole, repeated)
    monkeypatch.setattr(sla, "NUMBERS", 1)  # one head of k and v at a time
    torch.testing.assert_close(attention(method, q, k, v, projection), whole)


def test_half_precision_and_autocast_keep_the_linear_branch_in_float32():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 64, 16)
    projection = nn.Linear(16, 16)
    method = SLA(topk=0.5, block=(16, 16))
    exact = attention(method, *(x.bfloat16() for x in (q, k, v)), projection)
    assert exact.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(method, *(x.bfloat16() for x in (q, k, v)), projection), exact)


def test_it_plans_without_reading_anything_on_the_host():
    layout = VideoLayout(3, 4, 5, text_before=2, text_after=3)
    q, k, v = (torch.empty(2, 3, layout.tokens, 16, device="meta", dtype=torch.bfloat16) for _ in range(3))
    for scope in ("all", "marginal"):
        method = SLA(topk=0.3, block=(16, 8), linear_scope=scope)
        plan = method.plan(q, k, v, layout, PlanMemory())
        out = method.complete(q, q, k, v, plan, layout, nn.Linear(16, 16, device="meta"))
        assert out.device.type == "meta" and out.shape == q.shape


def test_dense_calls_get_nothing_added():
    q, k, v = torch.randn(3, 1, 2, 64, 8)
    method = SLA(block=(16, 16), schedule=DenseSchedule(first_layers=1))
    torch.testing.assert_close(
        attention(method, q, k, v, nn.Linear(8, 8)), F.scaled_dot_product_attention(q, k, v), atol=0, rtol=0
    )


@pytest.mark.parametrize("text", [0, 60])
@pytest.mark.parametrize("density", [0.3, 0.5, 1.0])
def test_a_density_is_met_to_a_block(density, text):
    layout = VideoLayout(16, 8, 8, text_after=text)
    method = SLA.for_density(layout, density, linear_scope="none")
    q, k, v = torch.randn(3, 1, 2, layout.tokens, 16)
    measured = method.plan(q, k, v, layout, PlanMemory()).density()
    assert measured == pytest.approx(density, abs=0.5 / 16 + 1e-6)
    assert measured == pytest.approx(method.expected_density(layout))


def test_a_density_that_cannot_be():
    assert METHODS["sla"] is SLA
    with pytest.raises(ValueError, match=r"density 0\.01 is below 0\.250, .*raise density, or use smaller blocks"):
        SLA.for_density(VideoLayout(4, 8, 8), 0.01)


def test_a_density_and_what_it_decides_are_not_both_given():
    with pytest.raises(ValueError, match=r"^SLA has density 0\.5 and topk 0\.1: give one of them\.$"):
        SLA.for_density(VideoLayout(21, 8, 8), 0.5, topk=0.1)


def test_missing_weights_are_refused():
    q, k, v = torch.randn(3, 1, 2, 64, 8)
    with pytest.raises(ValueError, match='linear_scope "all" needs the projection that was trained for the layer'):
        attention(SLA(block=(16, 16)), q, k, v, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topk": 0.0}, "topk is 0.0: it must be above 0 and at most 1"),
        ({"block": 64}, r"block is 64: it is \(queries, keys\)"),
        ({"block": (64, 0)}, r"block\[1\] is 0: it must be a whole number of at least 1"),
        ({"linear_scope": "some"}, "linear_scope is 'some': choose all, non_critical, marginal, none"),
        ({"feature_map": "hedgehog"}, "feature_map is 'hedgehog': choose softmax, elu, relu"),
        ({"skip": 0.1}, 'skip is 0.1, of use only with linear_scope "marginal"'),
        ({"skip": 1.0, "linear_scope": "marginal"}, "skip is 1.0: it must be at least 0 and below 1"),
        ({"eps": -1.0}, "eps is -1.0: it must be at least 0 and finite"),
        ({"eps": "0.1"}, "eps is '0.1': it must be at least 0 and finite"),
        ({"skip": "0.1", "linear_scope": "marginal"}, "skip is '0.1': it must be at least 0 and below 1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SLA(**settings)
