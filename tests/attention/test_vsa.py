"""VSA: against the published implementation, formulas written out, gradients in float64, and its bounds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from live_bytes import LiveBytes
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint

from vidaccel import VSA, DenseSchedule, SparseAttention, VideoLayout
from vidaccel.attention import PlanMemory, StepInfo
from vidaccel.attention.methods.base import OutOfReach

GOLDEN = Path(__file__).parents[1] / "data/vsa_6x9x7_top5.safetensors"


def attention(method, q, k, v, gate, layout, backend="auto", schedule=None):
    """A call through an engine, as a model makes it."""
    engine = SparseAttention(method, num_layers=1, backend=backend, schedule=schedule)
    engine.enter(StepInfo(num_steps=2), layout)
    return engine(q, k, v, 0, weights=gate)


def tokens(layout, heads=2, kv_heads=None, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, h, layout.tokens, 8) for h in (heads, kv_heads or heads, kv_heads or heads, heads)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("backend", ["masked", "gather", "reference"])
def test_outputs_of_the_published_implementation(backend):
    """FastVideo's means, choice and Triton kernel for cubes of 64, in the interpreter, in float32 throughout; inputs in
    float16."""
    with safe_open(GOLDEN, "pt") as file:
        facts, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    layout = VideoLayout(*map(int, facts["grid"].split(",")))
    q, k, v, gate = (tensors[name].float() for name in ("q", "k", "v", "gate"))
    cubes = math.prod(VSA().cubes(layout))
    method = VSA(density=int(facts["topk"]) / cubes)
    selected = method.plan(q, k, v, layout, PlanMemory()).selection[0]
    assert torch.equal(selected, tensors["mask"].bool())
    out = attention(method, q, k, v, gate, layout, backend)
    torch.testing.assert_close(out, tensors["out"], atol=2e-6, rtol=0.0)


def written_out(method, q, k, v, gate, layout, read=None):
    """One head, cube by cube, from the definition in the docstring; `read` key cubes, all where that is None."""
    first = layout.text_before
    places: dict[tuple, list[int]] = {}
    for frame in range(layout.frames):
        for row in range(layout.height):
            for column in range(layout.width):
                cube = tuple(x // edge for x, edge in zip((frame, row, column), method.cube, strict=True))
                token = first + (frame * layout.height + row) * layout.width + column
                places.setdefault(cube, []).append(token)
    cubes = [torch.tensor(places[cube]) for cube in sorted(places)]
    video = torch.cat(cubes)
    text = torch.tensor([t for t in range(layout.tokens) if t not in set(video.tolist())], dtype=torch.long)
    scale = q.shape[-1] ** -0.5
    means = [torch.stack([x[cube].mean(0) for cube in cubes]) for x in (q, k, v)]
    scores = means[0] @ means[1].T * scale
    out = torch.empty_like(q)
    if len(text):
        out[text] = (q[text] @ k.T * scale).softmax(-1) @ v
    for place, cube in enumerate(cubes):
        best = scores[place].argsort(descending=True)[:read]
        known = torch.cat([*(cubes[number] for number in best), text])
        fine = (q[cube] @ k[known].T * scale).softmax(-1) @ v[known]
        out[cube] = fine + gate[cube] * (scores[place].softmax(-1) @ means[2])
    return out


@pytest.mark.parametrize("cube", [(4, 4, 4), (2, 3, 1), (9, 9, 9)], ids=str)
@pytest.mark.parametrize("layout", [VideoLayout(5, 6, 7), VideoLayout(4, 4, 5, 3, 2), VideoLayout(1, 9, 4, 0, 1)])
def test_what_the_docstring_says(layout, cube):
    method = VSA(density=0.3, cube=cube)
    q, k, v, gate = tokens(layout)
    out = attention(method, q, k, v, gate, layout)
    read = method.cubes_read(layout)
    for head in range(2):
        wanted = written_out(method, *(x[0, head] for x in (q, k, v, gate)), layout, read)
        torch.testing.assert_close(out[0, head], wanted, atol=1e-9, rtol=0.0)


def test_query_heads_that_share_keys():
    layout = VideoLayout(4, 5, 6)
    q, k, v, gate = tokens(layout, heads=4, kv_heads=2)
    out = attention(VSA(), q, k, v, gate, layout)
    alone = attention(VSA(), q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), gate, layout)
    torch.testing.assert_close(out, alone)


def test_a_dense_call_keeps_the_coarse_branch_and_all_cubes_are_the_same():
    layout = VideoLayout(4, 5, 6)
    q, k, v, gate = tokens(layout)
    dense = attention(VSA(), q, k, v, gate, layout, schedule=DenseSchedule(first_steps=1))
    torch.testing.assert_close(dense, attention(VSA(density=1.0), q, k, v, gate, layout))
    torch.testing.assert_close(dense[0, 0], written_out(VSA(), *(x[0, 0] for x in (q, k, v, gate)), layout))


def test_without_gates_nothing_is_added():
    layout = VideoLayout(4, 5, 6)
    q, k, v, gate = tokens(layout)
    bare = attention(VSA(gated=False), q, k, v, None, layout)
    torch.testing.assert_close(bare, attention(VSA(), q, k, v, torch.zeros_like(gate), layout))
    with pytest.raises(ValueError, match=r"VSA needs the gates that were trained for the layer: .* gated=False"):
        attention(VSA(), q, k, v, None, layout)


def test_means_of_half_precision_are_rounded_once():
    """As published code keeps them; each is within half a step of bfloat16 of the exact mean."""
    layout = VideoLayout(3, 5, 5)
    q = tokens(layout, dtype=torch.float32)[0]
    method = VSA(density=0.5)
    low, exact = (method._means(x, layout) for x in (q.bfloat16(), q.bfloat16().double()))
    assert low.dtype == torch.float32 and low.equal(exact.bfloat16().float())


def test_gradients_reach_everything():
    layout = VideoLayout(2, 4, 3, text_after=2)
    method = VSA(density=0.5, cube=(2, 2, 2))
    inputs = [x[..., :4].contiguous().requires_grad_() for x in tokens(layout, heads=1)]
    assert torch.autograd.gradcheck(lambda *x: attention(method, *x, layout, "gather"), inputs)


def made_bytes(call, *inputs):
    """The bytes at most of what a call makes, beside its inputs."""
    with LiveBytes() as alive:
        for x in inputs:
            x.view_as(x)  # counted from here on
        before = alive.now
        call()
    return alive.peak - before


@torch.no_grad()
def test_no_copy_of_the_whole_sequence():
    layout = VideoLayout(16, 22, 24)  # with a layer of cubes that are not whole
    q, k, v, gate = (x.bfloat16() for x in tokens(layout, heads=4, dtype=torch.float32))
    method = VSA()
    plan = method.plan(q, k, v, layout, PlanMemory())
    assert made_bytes(lambda: method._means(q, layout), q) < 0.8 * q.nbytes  # the sums of four tokens in float32: 0.5
    out = v.clone()
    assert made_bytes(lambda: method.complete(out, q, k, v, plan, layout, gate), q, k, v, gate, out) < 0.5 * q.nbytes
    peak = made_bytes(lambda: method.complete(out, q, k, v, None, layout, gate), q, k, v, gate, out)
    assert peak < 1.5 * q.nbytes  # one for the output


@pytest.mark.parametrize("layout", [VideoLayout(5, 6, 7), VideoLayout(4, 4, 5, 3, 2)])
def test_means_are_computed_once_and_without_gradients_nothing_else_comes_out(layout, monkeypatch):
    q, k, v, gate = tokens(layout)
    means, computed = VSA._means, []
    monkeypatch.setattr(VSA, "_means", lambda *given: computed.append(1) or means(*given))
    method = VSA(density=0.4, cube=(2, 2, 2))
    with torch.inference_mode():
        out = attention(method, q, k, v, gate, layout)
        assert len(computed) == 3
    with_gradients = attention(method, q, k, v, gate.requires_grad_(), layout)
    assert len(computed) == 6 and with_gradients.requires_grad and with_gradients.equal(out)
    with_gradients = attention(method, q.requires_grad_(), k, v, gate, layout)
    assert len(computed) == 11 and with_gradients.equal(out)  # what is planned records none


def test_the_output_of_a_model_is_not_written_to():
    """Where attention is left out, it may be the values."""
    layout = VideoLayout(4, 5, 6, text_after=3)
    q, k, v, gate = tokens(layout)
    before = v.clone()
    engine = SparseAttention(VSA(), num_layers=1)
    engine.enter(StepInfo(num_steps=2), layout)
    out = engine(q, k, v, 0, dense="left out", stock=lambda q, k, v: v, weights=gate)
    assert v.equal(before) and not out.equal(before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_that_runs_again_for_its_gradients(reentrant):
    layout = VideoLayout(4, 5, 6)
    inputs = [x.requires_grad_() for x in tokens(layout)]
    engine = SparseAttention(VSA(density=0.4, cube=(2, 2, 2)), num_layers=1, backend="gather")

    def gradients(run):
        engine.enter(StepInfo(num_steps=2), layout)
        out = run(lambda q, k, v, gate: engine(q * 2, k * 2, v * 2, 0, weights=gate * 2))
        plans = list(engine._passes._plans.values())
        assert len(plans) == 1 and plans[0].coarse is None  # which is of the call alone
        out.square().sum().backward()  # reentrant checkpointing has no other
        found = [out, *(x.grad for x in inputs)]
        for x in inputs:
            x.grad = None
        return found

    wanted = gradients(lambda layer: layer(*inputs))
    for got, want in zip(
        gradients(lambda layer: checkpoint(layer, *inputs, use_reentrant=reentrant)), wanted, strict=True
    ):
        assert got.equal(want)


@pytest.mark.parametrize(
    ("density", "cubes", "read"), [(0.2, 15, 3), (0.1, 30, 3), (0.2, 16, 4), (0.01, 10, 1), (1.0, 7, 7), (0.3, 10, 3)]
)
def test_as_many_cubes_as_published(density, cubes, read):
    layout = VideoLayout(4, 4, 4 * cubes)
    assert VSA(density=density).cubes_read(layout) == read


def test_expected_density_and_that_of_a_plan():
    layout = VideoLayout(8, 8, 12, text_after=5)
    method = VSA.for_density(layout, 0.4)
    q, k, v, _ = tokens(layout, dtype=torch.float32)
    plan = method.plan(q, k, v, layout, PlanMemory())
    assert plan.density() == pytest.approx(method.expected_density(layout)) == pytest.approx(0.4, abs=0.05)
    plan.validate()
    with pytest.raises(
        OutOfReach, match=r"VSA density 0.05 is below 0.\d+, which is one key cube of 64 tokens for each"
    ):
        VSA.for_density(layout, 0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.0}, r"VSA density is 0.0: it must be above 0 and at most 1"),
        ({"cube": 4}, r"VSA cube is 4: it is \(frames, rows, columns\), such as \(4, 4, 4\)"),
        ({"cube": (4, 4)}, r"VSA cube is \(4, 4\)"),
        ({"cube": (4, 0, 4)}, r"VSA cube\[1\] is 0: it must be a whole number of at least 1"),
        ({"gated": "no"}, r"VSA gated is 'no': it must be True or False"),
    ],
)
def test_values_out_of_bounds(settings, message):
    with pytest.raises(ValueError, match=message):
        VSA(**settings)


@pytest.mark.parametrize("schedule", [None, DenseSchedule(first_layers=1)])
def test_autocast_leaves_the_coarse_branch_as_it_is(schedule):
    """Also of calls that stay dense: it computes in float32 whatever q, k and v are in."""
    layout = VideoLayout(4, 6, 8)
    given = [layout, "auto", schedule]
    q, k, v, gate = tokens(layout, dtype=torch.bfloat16)
    wanted = attention(VSA(cube=(2, 2, 2)), q, k, v, gate, *given)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(VSA(cube=(2, 2, 2)), q, k, v, gate, *given).equal(wanted)
