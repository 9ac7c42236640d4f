from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plans import clusters, masked_attention, uniform
from torch.utils._python_dispatch import TorchDispatchMode

from vidaccel import SVG, SVG2, BlockPlan, VideoLayout, sparse_attention
from vidaccel.attention import BACKENDS, PlanMemory
from vidaccel.attention.backends import Request, flex, gather, masked, pick, refusal, runs_somehow
from vidaccel.attention.backends.base import AS_INPUTS
from vidaccel.attention.functional import choose_backend
from vidaccel.attention.methods import svg

SPARSE = [
    pytest.param(name, marks=[pytest.mark.compiler] if name == "flex" else [])
    for name in ("flex", "gather", "masked", "reference")
]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# FlexAttention compiles for every new combination of shapes, so all plans here share one.
B, H, N, D = 2, 2, 150, 32

PLANS = {
    "uniform": lambda: uniform(B, H, N, N, 32, 32),
    "broadcast": lambda: uniform(1, 1, N, N, 32, 32),
    "ragged": lambda: clusters(B, H, N, N, 7, 20),
    "skewed": lambda: clusters(B, H, N, N, 7, 20, skew=8.0),
    "one key": lambda: uniform(B, H, N, N, 32, 1, share=0.03),
    "all": lambda: uniform(B, H, N, N, 32, 32, share=1.1),
}


def tokens(dtype: torch.dtype = torch.float32, n: int = N, d: int = D, heads: int = H):
    return tuple(torch.randn(B, heads, n, d).to(dtype) for _ in range(3))


def repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
    """k and v with a head for each of q."""
    return q, *(x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))


@pytest.mark.parametrize("backend", SPARSE)
@pytest.mark.parametrize("kind", PLANS)
def test_every_backend_computes_what_the_plan_says(backend, kind):
    plan, mask = PLANS[kind]()
    q, k, v = tokens()
    expected, _ = masked_attention(q, k, v, mask)
    got = sparse_attention(q, k, v, plan, backend=backend)
    assert (got - expected).abs().max() <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("backend", SPARSE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_within_its_error(backend, dtype):
    plan, mask = PLANS["ragged"]()
    q, k, v = tokens(dtype)
    expected, _ = masked_attention(q, k, v, mask)
    got = sparse_attention(q, k, v, plan, backend=backend)
    assert got.dtype == dtype
    assert (got - expected).abs().max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("backend", ["reference", "gather", "masked"])
@pytest.mark.parametrize("d", [16, 96, 128])
def test_head_dimensions(backend, d):
    plan, mask = PLANS["ragged"]()
    q, k, v = tokens(d=d)
    assert (sparse_attention(q, k, v, plan, backend=backend) - masked_attention(q, k, v, mask)[0]).abs().max() <= 2e-6


def test_cross_lengths():
    plan, mask = clusters(B, H, 40, 90, 5, 9)
    q, (k, v) = torch.randn(B, H, 40, D), torch.randn(2, B, H, 90, D)
    expected = masked_attention(q, k, v, mask)[0]
    for backend in ("reference", "gather", "masked"):
        assert (sparse_attention(q, k, v, plan, backend=backend) - expected).abs().max() <= 2e-6


def test_the_reference_in_float64_is_the_definition_and_returns_its_lse():
    plan, mask = PLANS["ragged"]()
    q, k, v = tokens(torch.float64)
    expected, lse = masked_attention(q, k, v, mask, scale=0.3)
    out, sums = sparse_attention(q, k, v, plan, backend="reference", scale=0.3, return_lse=True)
    assert (out - expected).abs().max() <= 1e-12
    torch.testing.assert_close(sums, lse.float())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", ["gather", "masked"])
def test_the_cpus_backends_return_the_lse_too(backend, dtype):
    plan, mask = PLANS["ragged"]()
    q, k, v = tokens(dtype)
    expected, lse = masked_attention(q.double(), k.double(), v.double(), mask)
    out, sums = sparse_attention(q, k, v, plan, backend=backend, return_lse=True)
    assert out.dtype == dtype and (out.double() - expected).abs().max() <= TOLERANCE[dtype]
    assert sums.dtype == torch.float32 and (sums - lse).abs().max() <= 2e-5


def test_gather_makes_no_gradient_of_all_keys_for_each_tile():
    """Else adding them up takes longer than attention: so many tensors of the size of q, k or v, whatever the tiles."""

    class Large(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            views = function in (torch.ops.aten.slice.Tensor, torch.ops.aten.detach.default)
            for tensor in out if isinstance(out, (list, tuple)) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.numel() >= size and not views and tensor._base is None:
                    Large.count += 1
            return out

    counts = []
    for tokens in (128, 512):
        plan, _ = uniform(1, 1, tokens, tokens, 8, 8, share=0.2)
        q, k, v = (torch.randn(1, 2, tokens, 16, requires_grad=True) for _ in range(3))
        size, Large.count = q.numel(), 0
        out = sparse_attention(q, k, v, plan, backend="gather").sum()
        with Large():
            out.backward()
        counts.append(Large.count)
    assert counts[1] <= counts[0] + 2 <= 14


def test_gather_keeps_what_the_gradient_of_the_queries_alone_needs():
    plan, mask = clusters(1, 2, 40, 40, 5, 9)
    mask[..., 0] = True
    plan = BlockPlan.from_block_mask(mask, 1, 1, 40, 40)
    q, k, v = (torch.randn(1, 2, 40, 16, dtype=torch.float64) for _ in range(3))
    q.requires_grad_()
    (got,) = torch.autograd.grad(sparse_attention(q, k, v, plan, backend="gather").square().sum(), q)
    (expected,) = torch.autograd.grad(masked_attention(q, k, v, mask)[0].square().sum(), q)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", SPARSE)
def test_rows_without_keys_give_zero_not_nan(backend):
    blocks = torch.zeros(5, 5, dtype=torch.bool)
    blocks[1:, 0] = True
    plan = BlockPlan.from_block_mask(blocks, 32, 32, N, N)
    q, k, v = tokens()
    out = sparse_attention(q, k, v, plan, backend=backend)
    assert out[:, :, :32].eq(0).all() and out[:, :, 32:].ne(0).any() and out.isfinite().all()
    _, lse = sparse_attention(q, k, v, plan, return_lse=True)
    assert lse[:, :, :32].eq(float("-inf")).all() and lse[:, :, 32:].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "gather", "masked"])
def test_gradients_are_those_of_masked_attention(backend):
    plan, mask = clusters(1, 2, 40, 40, 5, 9)
    mask[..., 0, 0] = True  # SDPA's own gradient is NaN for a row without keys; compare where it is defined
    plan = BlockPlan.from_block_mask(mask, 1, 1, 40, 40)
    inputs = [torch.randn(1, 2, 40, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight = torch.randn(1, 2, 40, 16, dtype=torch.float64)
    rows = mask.any(-1, keepdim=True)
    got = torch.autograd.grad((sparse_attention(*inputs, plan, backend=backend) * weight * rows).sum(), inputs)
    expected = torch.autograd.grad((masked_attention(*inputs, mask | ~rows)[0] * weight * rows).sum(), inputs)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("temporal", [[[0, 1, 1, 0]], [[0, 0, 1, 0], [1, 1, 1, 1]], [[1, 1, 1, 1]]], ids=str)
def test_masks_that_heads_share_are_kept_and_mean_the_plan(temporal, kv_heads, monkeypatch):
    layout = VideoLayout(frames=5, height=3, width=4, text_after=3)
    static = svg._Static(SVG(density=0.5, tile=4), layout, torch.device("cpu"))
    # once for a dtype and a plan that a head follows
    made, whole = [], BlockPlan.to_dense_mask
    q, k, v = (torch.randn(2, heads, layout.tokens, 16) for heads in (4, kv_heads, kv_heads))
    for some in (temporal, temporal[::-1]):
        plan = static.combine(torch.tensor(some, dtype=torch.bool))
        expected, _ = masked_attention(*repeated(q, k, v), plan.to_dense_mask())
        monkeypatch.setattr(BlockPlan, "to_dense_mask", lambda plan: made.append(plan) or whole(plan))
        for dtype in (torch.float32, torch.bfloat16):
            got = sparse_attention(*(x.to(dtype) for x in (q, k, v)), plan, backend="masked")
            assert (got - expected).abs().max() <= TOLERANCE[dtype]
        monkeypatch.undo()
    assert len(made) == 2 * len({kind for row in temporal for kind in row})


def test_short_sequences_of_small_tiles_get_a_mask_the_longer_where_it_is_kept():
    def chosen(method, frames):
        layout = VideoLayout(frames, 8, 8)
        q, k, v = torch.randn(3, 1, 2, layout.tokens, 16)
        return choose_backend(q, k, v, method.plan(q, k, v, layout, PlanMemory()), "auto").name

    assert [chosen(SVG2(density=0.2), frames) for frames in (9, 33)] == ["masked", "gather"]
    assert [chosen(SVG(density=0.2), frames) for frames in (9, 33, 49)] == ["masked", "masked", "gather"]


def test_masks_of_inference_serve_training():
    plan, mask = PLANS["broadcast"]()
    q, k, v = tokens()
    with torch.inference_mode():
        sparse_attention(q, k, v, plan, backend="masked")
    assert plan._masks
    inputs = [x.requires_grad_() for x in (q, k, v)]
    got = torch.autograd.grad(sparse_attention(*inputs, plan, backend="masked").sum(), inputs)
    expected = torch.autograd.grad(masked_attention(*inputs, mask)[0].sum(), inputs)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other.float(), atol=1e-5, rtol=1e-5)


def test_masks_of_long_sequences_are_not_kept(monkeypatch):
    monkeypatch.setattr(masked, "KEPT", N * N - 1)
    plan, mask = PLANS["broadcast"]()
    q, k, v = tokens()
    got = sparse_attention(q, k, v, plan, backend="masked")
    assert (got - masked_attention(q, k, v, mask)[0]).abs().max() <= TOLERANCE[torch.float32] and not plan._masks


@pytest.mark.parametrize("backend", SPARSE)
def test_strided_inputs_need_no_copy_by_the_caller(backend):
    plan, mask = PLANS["ragged"]()
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tokens())
    assert not q.is_contiguous()
    expected = masked_attention(q, k, v, mask)[0]
    assert (sparse_attention(q, k, v, plan, backend=backend) - expected).abs().max() <= 2e-6


@pytest.mark.compiler
def test_flex_skips_what_the_plan_skips():
    """A sixteenth of the blocks must cost well under half of all blocks: eager FlexAttention would cost more."""
    import time

    n = 4096
    q, k, v = (torch.randn(1, 2, n, 64) for _ in range(3))
    seconds = {}
    for name, share in (("all", 1.1), ("few", 0.0)):
        blocks = torch.rand(n // 64, n // 64) < share
        blocks |= torch.eye(n // 64).bool().repeat_interleave(4, 0)[: n // 64] | torch.eye(n // 64).bool()
        plan = BlockPlan.from_block_mask(blocks, 64, 64, n, n)
        for _ in range(4):
            start = time.perf_counter()
            sparse_attention(q, k, v, plan, backend="flex")
            seconds[name] = min(seconds.get(name, 1e9), time.perf_counter() - start)
    assert seconds["few"] < 0.5 * seconds["all"]


@pytest.mark.compiler
def test_flex_goes_on_where_more_shapes_come_than_are_kept(monkeypatch, caplog):
    """Texts of ever other lengths, in a run of hours."""
    monkeypatch.setattr(flex, "MAX_COMPILED_SHAPES", 2)
    torch._dynamo.eval_frame.remove_from_cache(flex._flex_attention)
    for n in (33, 34, 35, 36, 33):
        q, k, v = (torch.randn(1, 1, n, 8) for _ in range(3))
        plan = BlockPlan.from_block_mask(torch.eye(-(-n // 16)).bool(), 16, 16, n, n)
        found = sparse_attention(q, k, v, plan, backend="flex")
        torch.testing.assert_close(found, sparse_attention(q, k, v, plan, backend="reference"))
    assert sum("compiled for 2 shapes" in record.message for record in caplog.records) == 2


class TestPick:
    def request(self, **changes) -> Request:
        values = {
            "device": torch.device("cpu"),
            "dtype": torch.float32,
            "head_dim": 64,
            "queries": 100,
            "precision": AS_INPUTS,
        }
        return Request(**{**values, "dense": False, "lse": False, "grad": False, **changes})

    def test_dense_goes_to_sdpa(self):
        assert pick("auto", self.request(dense=True), scattered=False).name == "sdpa"

    @pytest.mark.compiler
    def test_auto_follows_what_is_measured_to_be_fast(self):
        assert pick("auto", self.request(), scattered=True).name == "gather"
        assert pick("auto", self.request(), scattered=False).name == "gather"
        assert pick("auto", self.request(queries=8000), scattered=False).name == "flex"

    def test_auto_masks_short_sequences_of_small_tiles(self):
        small = {"small_tiles": True, "queries": 1088}
        for scattered in (True, False):
            assert pick("auto", self.request(**small), scattered=scattered).name == "masked"
            assert pick("auto", self.request(**small, grad=True, lse=True), scattered=scattered).name == "masked"
        assert pick("auto", self.request(**{**small, "queries": 2112}), scattered=True).name == "gather"
        assert pick("auto", self.request(**small, device=torch.device("mps")), scattered=True).name == "gather"

    def test_auto_respects_what_is_needed(self):
        assert pick("auto", self.request(lse=True, queries=2**16), scattered=False).name == "gather"
        assert pick("auto", self.request(queries=8000, grad=True), scattered=False).name == "gather"

    def test_auto_without_a_compiler_takes_the_next(self, monkeypatch):
        monkeypatch.setattr("vidaccel.attention.code_generator._cpp_compiler", lambda: False)
        assert pick("auto", self.request(queries=8000), scattered=False).name == "gather"
        with pytest.raises(RuntimeError, match="'flex'.*C\\+\\+ compiler"):
            pick("flex", self.request(), scattered=False)

    @pytest.mark.parametrize(
        ("name", "changes", "message"),
        [
            ("sdpa", {}, "dense attention only"),
            pytest.param("flex", {"lse": True}, "no log-sum-exp on cpu", marks=pytest.mark.compiler),
            pytest.param("flex", {"grad": True}, "no backward on cpu", marks=pytest.mark.compiler),
            pytest.param("flex", {"head_dim": 300}, "up to 256, not 300", marks=pytest.mark.compiler),
            pytest.param("flex", {"dtype": torch.float64}, "not float64", marks=pytest.mark.compiler),
            ("reference", {"device": torch.device("meta")}, "not on meta"),
        ],
    )
    def test_a_named_backend_runs_or_says_why_not(self, name, changes, message):
        with pytest.raises(RuntimeError, match=message):
            pick(name, self.request(**changes), scattered=True)

    def test_unknown_names_list_the_known(self):
        with pytest.raises(ValueError, match="unknown backend 'cuda'.*flex.*gather"):
            pick("cuda", self.request(), scattered=True)

    def test_auto_says_why_nothing_runs(self):
        with pytest.raises(RuntimeError, match="gather runs on cpu, cuda, mps, xpu, not on meta"):
            pick("auto", self.request(device=torch.device("meta")), scattered=True)

    def test_every_backend_describes_itself(self):
        for backend in BACKENDS.values():
            assert "head_dim" in backend.describe() and backend.summary


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", ["gather", "masked"])
def test_under_autocast_the_output_has_the_dtype_of_the_queries(backend, grad):
    q, k, v = (x.requires_grad_(grad) for x in tokens())
    with torch.autocast("cpu", torch.bfloat16):
        assert sparse_attention(q, k, v, PLANS["ragged"]()[0], backend=backend).dtype == torch.float32


def test_autocast_rounds_nothing_within_the_oracle():
    q, k, v = (x.bfloat16() for x in tokens())
    plan, _ = PLANS["ragged"]()
    alone = sparse_attention(q, k, v, plan, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        assert sparse_attention(q, k, v, plan, backend="reference").equal(alone)


def test_gather_keeps_no_more_copies_of_keys_than_threads(monkeypatch):
    """However many heads have tiles of their own: in long videos each is a share of k and v."""
    made = []
    new = gather._Scratch.of

    def of(self, like, *shape):
        made.append((new(self, like, *shape).untyped_storage().data_ptr(), self))
        return new(self, like, *shape)

    monkeypatch.setattr(gather._Scratch, "of", of)
    q, k, v = (torch.randn(2, 6, N, D) for _ in range(3))
    plan, _ = clusters(2, 6, N, N, 3, 20)
    sparse_attention(q, k, v, plan, backend="gather")
    assert len(made) > 24 and len({id(scratch) for _, scratch in made}) == 1


def test_tiles_that_leave_queries_out_are_refused():
    plan = PLANS["uniform"]()[0]
    short = replace(plan, tile_len=plan.tile_len - 1)
    with pytest.raises(ValueError, match="the tiles of the plan hold 145 of the 150 queries"):
        sparse_attention(*tokens(), short, backend="gather")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, p: (q[:, :, :-1], k, v, p), "150 queries and 150 keys, but q has 149"),
        (lambda q, k, v, p: (q, k.half(), v, p), "one dtype"),
        (lambda q, k, v, p: (q, k, v[:, :1], p), "k and v in heads"),
        (lambda q, k, v, p: (q[0], k[0], v[0], p), r"\[B, H, N, D\]"),
        (lambda q, k, v, p: (q.to("meta"), k, v, p), "one device"),
        (lambda q, k, v, p: (q[:, :1], k[:, :1], v[:, :1], p), "heads dimension is 2, but q has 1"),
    ],
)
def test_disagreement_with_the_plan_is_named(change, message):
    q, k, v, plan = change(*tokens(), PLANS["uniform"]()[0])
    with pytest.raises(ValueError, match=message):
        sparse_attention(q, k, v, plan)


def test_why_sparse_attention_cannot_run_on_a_device(monkeypatch):
    monkeypatch.setattr("vidaccel.attention.own_kernels._FOUND", False)
    assert refusal("auto", torch.device("cpu")) is None
    assert refusal("sdpa", torch.device("cpu")) == "computes dense attention only"
    on_cuda = refusal("auto", torch.device("cuda"))
    # `gather` would run there, far slower than dense attention.
    assert on_cuda.startswith("finds no backend that is fast on cuda: triton needs triton") and "flex" in on_cuda
    assert "gather" not in on_cuda and "pip install triton" in on_cuda
    assert "gather runs on cpu, cuda, mps, xpu, not on hpu" in refusal("auto", torch.device("hpu"))
    with pytest.raises(ValueError, match="unknown backend 'cudnn'"):
        refusal("cudnn", torch.device("cpu"))


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_other_devices_get_what_is_made_of_torchs_operators(device):
    def request(dtype=torch.float16, dense=False):
        return Request(torch.device(device), dtype, 64, 9000, dense, False, False, AS_INPUTS)

    assert refusal("auto", torch.device(device)) is None and runs_somehow(torch.device(device))
    assert pick("auto", request(), scattered=False).name == pick("auto", request(), scattered=True).name == "gather"
    assert pick("auto", request(dense=True), scattered=False).name == "sdpa"
    for name in ("triton", "flex"):
        with pytest.raises(RuntimeError, match=f"not on {device}"):
            pick(name, request(), scattered=False)
    if device == "mps":
        with pytest.raises(RuntimeError, match="no float64 on mps"):
            pick("auto", request(torch.float64), scattered=False)


@pytest.mark.parametrize("wrong", [(torch.zeros(1), None), (torch.zeros(1, 2, 8, 16), None)])
def test_what_a_backend_makes_of_another_shape_is_refused(monkeypatch, wrong):
    class Mine(type(BACKENDS["reference"])):
        name = "mine"

        def attend(self, *given):
            return wrong

    monkeypatch.setitem(BACKENDS, "mine", Mine())
    q = torch.randn(1, 2, 8, 16)
    with pytest.raises(RuntimeError, match=r"^the backend mine made .* for q \[1, 2, 8, 16\]: Backend\.attend must"):
        sparse_attention(q, q, q, BlockPlan.dense(8, 8), backend="mine", return_lse=True)
