"""What the backend says of itself and of machines that cannot run it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from plans import untrained

from vidaccel import BlockPlan, DenseSchedule, SparseAttention, VideoLayout, sparse_attention
from vidaccel.attention import StepInfo
from vidaccel.attention.backends import PREFERENCE, Request
from vidaccel.attention.backends.base import AS_INPUTS
from vidaccel.attention.backends.triton import TritonBackend

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def request(**changes) -> Request:
    values = {"device": CPU, "dtype": torch.float32, "head_dim": 64, "queries": 100, "precision": AS_INPUTS}
    return Request(**{**values, "dense": False, "lse": True, "grad": True, **changes})


def test_a_missing_triton_names_the_extra(monkeypatch):
    monkeypatch.setattr("vidaccel.attention.own_kernels._FOUND", False)
    for device in (CPU, CUDA):
        assert "pip install triton (on Windows: triton-windows)" in TritonBackend().unavailable(device)


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((8, 9), True), ((12, 0), True)])
def test_old_gpus_are_declined_with_their_compute_capability(monkeypatch, capability, runs):
    pytest.importorskip("triton")
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    reason = TritonBackend().unavailable(CUDA)
    assert reason is None if runs else "8.0 or higher, and this one has 7.5" in reason


@pytest.mark.parametrize(
    ("name", "runs"), [("gfx942:sramecc+:xnack-", True), ("gfx90a", True), ("gfx1100", False), ("gfx906", False)]
)
def test_gpus_of_amd_without_matrix_cores_are_declined(monkeypatch, name, runs):
    pytest.importorskip("triton")
    properties = SimpleNamespace(major=9 if "gfx9" in name else 11, minor=0, gcnArchName=name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    reason = TritonBackend().unavailable(CUDA)
    assert reason is None if runs else reason.endswith(f"gfx95), not {name}")


def test_the_cpu_needs_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "set TRITON_INTERPRET=1 before" in TritonBackend().declines(request())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert TritonBackend().declines(request()) is None
    assert TritonBackend().declines(request(dtype=torch.float16)) is None
    assert "bfloat16" in TritonBackend().declines(request(dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 320}, "up to 256, not 320"),
        ({"dtype": torch.float64}, "not float64"),
        ({"device": torch.device("meta")}, "not on meta"),
    ],
)
def test_what_it_does_not_take(monkeypatch, changes, message):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert message in TritonBackend().declines(request(**changes))


def test_auto_chooses_it_first_on_cuda_and_never_on_the_cpu():
    for (device, _), names in PREFERENCE.items():
        assert (names[0] == "triton") == (device == "cuda") and ("triton" in names) == (device == "cuda")


def test_what_is_made_of_a_plan_is_of_one_stream_and_not_kept_while_a_graph_is_captured(monkeypatch):
    pytest.importorskip("triton")
    from plans import KINDS

    from vidaccel.attention.kernels import walk

    plan, made = KINDS["uniform"](70)[0], []

    def make():
        made.append(None)
        return [torch.tensor(len(made))]

    calls = [(1, 1), (1, 1), (2, 2), (1, 1), (None, 3), (None, 4), (2, 2)]
    calls += [(3, 5), (4, 6), (5, 7), (2, 2), (1, 8)]  # of four streams
    for stream, expected in calls:
        monkeypatch.setattr(walk, "stream_of", lambda device, stream=stream: stream)
        assert walk.kept_on(plan, ("key",), make)[0] == expected


def test_a_plan_that_serves_many_calls_is_prepared_once(monkeypatch, device):
    from plans import KINDS, masked_attention

    from vidaccel.attention.kernels import walk

    made = []
    make = walk.make_walk
    monkeypatch.setattr(walk, "make_walk", lambda *a: made.append(a) or make(*a))
    plan, mask = KINDS["uniform"](70)
    plan = plan.to(device)
    for _ in range(3):
        q, k, v = (torch.randn(1, 2, 70, 64, device=device) for _ in range(3))
        out, _ = TritonBackend().attend(q, k, v, plan, 0.1, True)
        torch.testing.assert_close(
            out.double(), masked_attention(q, k, v, mask.to(device), 0.1)[0], atol=1e-5, rtol=1e-5
        )
    assert len(made) == 1


def test_a_plan_of_a_training_is_prepared_once_for_each_pass(monkeypatch, device):
    """And nothing for the backward pass where there is none."""
    from plans import KINDS, masked_attention

    from vidaccel.attention.kernels import block_sparse_backward, walk

    made = []
    make = walk.make_walk
    for module in (walk, block_sparse_backward):
        monkeypatch.setattr(module, "make_walk", lambda *a: made.append(a) or make(*a))
    # Another launch configuration than that of the forward pass, whose walk it would share.
    tiles = {(0, 64, 4): block_sparse_backward.QUERY_TILES[0, 64, 4]._replace(block_n=16)}
    monkeypatch.setattr(block_sparse_backward, "QUERY_TILES", block_sparse_backward.QUERY_TILES | tiles)
    plan, mask = KINDS["uniform"](70)
    plan, mask = plan.to(device), mask.to(device)
    plain = [torch.randn(1, 2, 70, 64, device=device) for _ in range(3)]
    TritonBackend().attend(*plain, plan, 0.1, True)
    assert len(made) == 1
    for _ in range(2):
        inputs = [torch.randn(1, 2, 70, 64, device=device, requires_grad=True) for _ in range(3)]
        found = torch.autograd.grad(TritonBackend().attend(*inputs, plan, 0.1, True)[0].square().sum(), inputs)
        wanted = torch.autograd.grad(masked_attention(*inputs, mask, 0.1)[0].square().sum(), inputs)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one.double(), other.double(), atol=1e-4, rtol=1e-4)
    assert len(made) == 2


@pytest.mark.parametrize("trained", ["", "q", "k"])
@pytest.mark.parametrize("precision", [None, "int8"])
def test_what_is_made_of_a_plan_is_made_before_attention_is_timed(monkeypatch, device, precision, trained):
    """Also of a plan that serves one call; and for the backward pass, where any of q, k and v has a gradient."""
    if precision and trained:
        pytest.skip("there is no backward pass in 8 bits")
    from vidaccel import SVG2, DenseSchedule, VideoLayout
    from vidaccel.attention import SparseAttention, StepInfo
    from vidaccel.attention.kernels import block_sparse_backward, block_sparse_int8, walk

    late = []
    attending = "attend" if precision is None else "attend_quantized"
    real = getattr(TritonBackend, attending)

    def attend(self, *arguments):
        for module in (walk, block_sparse_backward, block_sparse_int8):
            monkeypatch.setattr(module, "make_walk", lambda *a: late.append(a), raising=False)
        return real(self, *arguments)

    monkeypatch.setattr(TritonBackend, attending, attend)
    layout = VideoLayout(2, 4, 4)
    method = SVG2(density=0.5, q_clusters=2, k_clusters=4, init_iterations=1)
    options = {"schedule": DenseSchedule(), "backend": "triton", "precision": precision}
    engine = SparseAttention(method, num_layers=1, **options)
    engine.enter(StepInfo(), layout)
    inputs = {name: torch.randn(1, 2, layout.tokens, 16, device=device) for name in "qkv"}
    if trained:
        inputs[trained].requires_grad_()
    out = engine(**inputs, layer=0)
    if trained:
        out.sum().backward()
        assert inputs[trained].grad.isfinite().all()
    assert out.isfinite().all() and not late


@pytest.mark.parametrize("name", ["radial", "svg", "lvsa", "sla"])
def test_a_plan_made_in_inference_mode_serves_a_training_step(device, name):
    """As where a validation comes before: what belongs to a layout is kept, and gradients may need it."""
    layout = VideoLayout(4, 4, 8)
    q, k, v = torch.randn(3, 1, 2, layout.tokens, 16).to(device)
    engine = SparseAttention(untrained(name), num_layers=1, schedule=DenseSchedule(), backend="triton")
    with torch.inference_mode():
        engine.enter(StepInfo(num_steps=4), layout)
        engine(q, k, v, 0)
    q.requires_grad_()
    engine.enter(StepInfo(run=1, num_steps=4), layout)
    engine(q, k, v, 0).sum().backward()
    assert q.grad.isfinite().all()


def test_a_plan_used_in_inference_mode_serves_a_training_step(device):
    """Of tiles of 32 the walk of the backward pass is that of the forward pass."""
    plan = BlockPlan.from_block_mask(torch.ones(4, 4, dtype=torch.bool).tril(), 32, 32, 128, 128).to(device)
    q, k, v = torch.randn(3, 1, 2, 128, 64).to(device)
    with torch.inference_mode():
        sparse_attention(q, k, v, plan, backend="triton")
    q.requires_grad_()
    sparse_attention(q, k, v, plan, backend="triton").sum().backward()
    assert q.grad.isfinite().all()


def test_a_choice_of_plans_made_in_inference_mode_serves_training(device):
    """The copies of those that heads choose from are made once, whatever calls choose among them."""
    with torch.inference_mode():
        plans = tuple(BlockPlan.from_block_mask(torch.rand(2, 2) < 0.5, 32, 32, 64, 64).to(device) for _ in range(2))
    numbers = torch.zeros(1, 2, dtype=torch.int64, device=device)
    calls = [replace(BlockPlan.dense(64, 64, device), choice=(numbers, plans)).for_gradients() for _ in range(2)]
    assert calls[0].choice[1][0] is calls[1].choice[1][0] is not plans[0]
    assert not calls[0].choice[1][1].run_start.is_inference()
