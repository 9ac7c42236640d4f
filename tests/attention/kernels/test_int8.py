"""Attention with int8 scores: against the same quantisation in plain torch, and against the definition in float64.

The first comparison is tight and finds a wrong scale or key; the second says how much the quantisation itself costs.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from gpu_compiler import SHARED, run_with_compiler
from plans import KINDS, clusters, masked_attention

from vidaccel import BlockPlan, sparse_attention
from vidaccel.attention import BACKENDS, merge
from vidaccel.attention.backends.base import Precision
from vidaccel.attention.backends.triton import TritonBackend
from vidaccel.attention.compensate import attend_skipped
from vidaccel.attention.kernels.quantize_reference import int8_attention, quantize_channels, quantize_rows
from vidaccel.attention.skipped import SkippedClusters

pytest.importorskip("triton")

from vidaccel.attention.kernels import block_sparse_int8, quantize

INT8 = Precision("int8")
# Against the reference: what rounding P and V to the dtype costs (float32: nothing but the order of sums), and on the
# GPU, where products and sums round elsewhere, a few values that fall to the other side of a rounding step.
AGAINST_REFERENCE = {"cpu": {torch.float32: 5e-6, torch.float16: 2e-3}, "cuda": {torch.float32: 5e-3}}
# Against the definition, for normally distributed tokens: cosine, and error over the largest output.
COSINE, LARGEST_ERROR = 0.9998, 0.02
ON_GPU = 24


def length(device: torch.device, n: int) -> int:
    return n * ON_GPU if device.type == "cuda" else n


def tokens(device, n_q, n_kv, dim, dtype=torch.float32, batch=1, heads=2, offset=3.0):
    """Keys whose channels are off zero for all tokens alike, as those of trained models are."""
    q, k, v = (torch.randn(batch, heads, n, dim) for n in (n_q, n_kv, n_kv))
    return [x.to(device, dtype) for x in (q, k + offset * torch.randn(batch, heads, 1, dim), v)]


def attend(q, k, v, plan, scale, gather_kv=False, precision=INT8):
    return TritonBackend(gather_kv).attend_quantized(q, k, v, plan.to(q.device), scale, True, precision)


def k_block(q, plan):
    """How many keys share a scale in the kernel."""
    return block_sparse_int8.int8_tiles(q, plan.tile_len, plan.block[1] if plan.block else 0, False)[1]


def check(q, k, v, plan, mask, gather_kv=False):
    scale = 0.9 * q.shape[-1] ** -0.5
    out, lse = attend(q, k, v, plan, scale, gather_kv)
    assert out.shape == q.shape and out.dtype == q.dtype and lse.dtype == torch.float32

    plan, mask = plan.to(q.device), mask.to(q.device)
    same, same_lse = int8_attention(q, k, v, plan, scale, k_block=k_block(q, plan))
    tolerance = AGAINST_REFERENCE[q.device.type].get(q.dtype, 2e-2)
    torch.testing.assert_close(out.double(), same, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), same_lse, atol=tolerance, rtol=tolerance)

    exact, exact_lse = masked_attention(q, k, v, mask, scale)
    assert F.cosine_similarity(out.double().flatten(), exact.flatten(), 0) > COSINE
    assert (out - exact).abs().max() < LARGEST_ERROR * exact.abs().max()
    torch.testing.assert_close(lse.double(), exact_lse, atol=2e-2, rtol=0)
    return out


def text_rows(n: int):
    """Video in blocks of 16, the last block is text: it reads and is read by everything."""
    blocks = torch.eye(-(-n // 16), dtype=torch.bool)
    blocks[-1], blocks[:, -1] = True, True
    return BlockPlan.from_block_mask(blocks, 16, 16, n, n), blocks.repeat_interleave(16, 0).repeat_interleave(16, 1)[
        None, None, :n, :n
    ]


PLANS = {**KINDS, "text": text_rows}


# -- the quantisation passes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("n", "dim"), [(150, 64), (64, 40), (70, 96), (5, 128)])
def test_int8_values_and_scales(device, dtype, n, dim):
    """One pass gathers, smooths and rounds: what torch makes of it in three, but for a value here and there that lies
    halfway between two steps.
    """
    n = length(device, n)
    q, k, _ = tokens(device, n, n, dim, dtype, batch=2)
    q_order, kv_order = (torch.stack([torch.randperm(n) for _ in range(2)]).view(1, 2, n).to(device) for _ in "qk")
    got = quantize.quantize_qk(q, k.mT.contiguous().mT, q_order, kv_order, 0.3)
    mean = k.mean(2, keepdim=True, dtype=torch.float32)
    ordered = [x.float().gather(2, o.expand(2, 2, n)[..., None].expand_as(x)) for x, o in ((q, q_order), (k, kv_order))]
    for x, values, scale in (
        (ordered[0] * (0.3 * quantize.LOG2E), got.q, got.q_scale),
        (ordered[1] - mean, got.k, got.k_scale),
    ):
        expected, expected_scale = quantize_rows(x)
        assert values.dtype == torch.int8 and scale.shape == (2, 2, n)
        torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
        off = (values.int() - expected.int()).abs()
        assert off.max() <= 1 and off.float().mean() < 1e-3
        assert values.int().abs().amax(-1).eq(127).all(), "the range of int8 is used"
    shift = (ordered[0] * mean).sum(-1) * 0.3
    torch.testing.assert_close(got.lse_shift, shift, atol=1e-4, rtol=1e-5)


def test_every_token_has_half_a_step_of_its_own_as_error(device):
    """Also next to tokens a hundred times as long."""
    x = torch.randn(1, 2, 130, 64, device=device)
    x[:, :, ::7] *= 100
    got = quantize.quantize_qk(x, x, None, None, 1 / quantize.LOG2E)
    for values, scale, exact in ((got.q, got.q_scale, x), (got.k, got.k_scale, x - x.mean(2, keepdim=True))):
        error = (values * scale.unsqueeze(-1) - exact).abs().amax(-1)
        assert (error <= 0.501 / 127 * exact.abs().amax(-1)).all()
    assert (got.q_scale[:, :, ::7].amin() > 20 * got.q_scale[:, :, 1::7].amax()).all()


# -- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLANS)
def test_every_kind_of_plan(device, kind):
    n = length(device, 150)
    check(*tokens(device, n, n, 64), *PLANS[kind](n))


@pytest.mark.parametrize("dim", [16, 40, 96, 128, 256])
def test_head_dimensions_and_cross_lengths(device, dim):
    n_q, n_kv = length(device, 40), length(device, 90)
    check(*tokens(device, n_q, n_kv, dim), *clusters(1, 2, n_q, n_kv, 4, 9, share=0.8))


@pytest.mark.parametrize("n", [1, 7, 17])
def test_sequences_shorter_than_a_tile(device, n):
    check(*tokens(device, n, n, 64), BlockPlan.dense(n, n), torch.ones(1, 1, n, n, dtype=torch.bool))


ON_GPU_ONLY = [
    pytest.param(dtype, dim, marks=pytest.mark.gpu)
    for dtype in (torch.float16, torch.bfloat16)
    for dim in (80, 128, 256)
]


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float16, 64), *ON_GPU_ONLY])
def test_half_precision(device, dtype, dim):
    """Every configuration of the GPU, one in the interpreter."""
    n = length(device, 130)
    check(*tokens(device, n, n, dim, dtype), *PLANS["ragged"](n))
    check(*tokens(device, n, n, dim, dtype), *text_rows(n))


def test_orders_and_plans_broadcast(device):
    n = length(device, 70)
    plan = BlockPlan.from_block_mask(torch.rand(2, 1, 7, 7) < 0.7, n // 7, n // 7, n, n)
    order = torch.stack([torch.randperm(n) for _ in range(3)]).view(1, 3, n)
    plan = replace(plan, q_order=order, kv_order=order.flip(1), block=None)
    check(*tokens(device, n, n, 64, batch=2, heads=3), plan, plan.to_dense_mask())


def test_strided_inputs_and_values_read_through_their_order(device):
    n = length(device, 80)
    plan, mask = PLANS["ragged"](n)
    packed = torch.randn(1, n, 3, 2, 64, device=device)
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    out = check(q, k, v, plan, mask)
    assert out.transpose(1, 2).is_contiguous(), "the output of [B, N, H, D] memory is [B, N, H, D] memory"
    assert check(q, k, v, plan, mask, gather_kv=True).equal(out)
    columns = check(*(x.mT.contiguous().mT for x in (q, k, v)), plan, mask)
    torch.testing.assert_close(columns, out, atol=2e-3, rtol=0)  # torch adds up the mean in another order


def test_a_constant_added_to_all_keys_changes_nothing(device):
    """Not the softmax, and with the mean taken out not the rounding either; without, it ruins the resolution."""
    n = length(device, 100)
    plan, mask = PLANS["ragged"](n)
    q, k, v = tokens(device, n, n, 64, offset=0.0)
    shifted = k + 20 * torch.randn(1, 2, 1, 64, device=device)
    scale = 0.125
    out, lse = attend(q, k, v, plan, scale)
    moved, moved_lse = attend(q, shifted, v, plan, scale)
    # Sums in float32 round by 1e-6 of the offset, and that moves a few values to the next of the 255 steps.
    torch.testing.assert_close(moved, out, atol=2e-3, rtol=0)
    change = ((shifted - k)[:, :, :1] * q).sum(-1) * scale
    finite = lse.isfinite()
    torch.testing.assert_close((moved_lse - lse)[finite], change[finite], atol=2e-3, rtol=1e-5)
    assert change.abs().max() > 10, "the log-sum-exp does depend on the offset"

    exact, _ = masked_attention(q, shifted, v, mask.to(device), scale)
    rough, _ = int8_attention(q, shifted, v, plan.to(device), scale, smooth=False)
    assert (rough - exact).abs().max() > 5 * (moved - exact).abs().max()


def test_merge_with_an_exact_piece(device):
    """Both pieces see keys with an offset: a log-sum-exp of the smoothed keys would weigh them wrongly."""
    n = length(device, 120)
    plan, mask = PLANS["ragged"](n)
    q, k, v = tokens(device, n, n, 64)
    cut = n // 3  # in permuted keys: the first third in int8, the rest exactly
    starts, ends = plan.run_start, plan.run_start + plan.run_len
    halves = []
    for side in ({"max": cut}, {"min": cut}):
        first, last = starts.clamp(**side), ends.clamp(**side)
        halves.append(replace(plan, run_start=first, run_len=last - first, selection=None).to(device))
    out, lse = merge(*attend(q, k, v, halves[0], 0.125), *TritonBackend().attend(q, k, v, halves[1], 0.125, True))
    exact, exact_lse = masked_attention(q, k, v, mask.to(device), 0.125)
    assert F.cosine_similarity(out.double().flatten(), exact.flatten(), 0) > COSINE
    torch.testing.assert_close(lse.double(), exact_lse, atol=2e-2, rtol=0)


def test_means_of_skipped_clusters_join_in(device):
    n = length(device, 90)
    plan = PLANS["ragged"](n)[0].to(device)
    q, k, v = tokens(device, n, n, 64)
    means = SkippedClusters(*torch.randn(2, 1, 2, 20, 64, device=device))
    plan = replace(plan, skipped=means)
    out = sparse_attention(q, k, v, plan, backend="triton", qk="int8")
    exact = sparse_attention(q, k, v, plan, backend="triton")
    assert 0 < (out - exact).abs().max() < 2e-2


def test_rows_without_keys_give_zero_and_minus_infinity(device):
    n = length(device, 70)
    blocks = torch.zeros(7, 7, dtype=torch.bool)
    blocks[1:, 0] = True
    plan = BlockPlan.from_block_mask(blocks, n // 7, n // 7, n, n)
    out, lse = attend(*tokens(device, n, n, 64), plan, 0.1)
    assert out[:, :, : n // 7].eq(0).all() and lse[:, :, : n // 7].eq(float("-inf")).all()
    assert out[:, :, n // 7 :].isfinite().all() and lse[:, :, n // 7 :].isfinite().all()


def test_blocks_of_zeros_and_negative_scales(device):
    """Keys that are all the same smooth to zero, and a scale of the scores may have any sign."""
    n = length(device, 70)
    q, k, v = tokens(device, n, n, 64)
    plan, mask = BlockPlan.dense(n, n), torch.ones(1, 1, n, n, dtype=torch.bool, device=device)
    for queries, keys in ((q, k[:, :, :1].expand_as(k)), (q * 0, k)):
        out, _ = attend(queries, keys, v, plan, 0.1)
        torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out), atol=1e-5, rtol=1e-5)
    out, lse = attend(q, k, v, plan, -0.1)
    exact, exact_lse = masked_attention(q, k, v, mask, -0.1)
    torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=0)
    torch.testing.assert_close(lse.double(), exact_lse, atol=2e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_scores_do_not_overflow(device, dtype):
    """With scores in the hundreds softmax picks single keys; a rounding that falls elsewhere may pick another."""
    n = length(device, 70)
    q, k, v = tokens(device, n, n, 64, dtype)
    plan, _ = PLANS["ragged"](n)
    out, lse = attend(q * 30, k * 30, v, plan, 0.125)
    expected, expected_lse = int8_attention(q * 30, k * 30, v, plan.to(device), 0.125)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-2, rtol=1e-4 if device.type == "cpu" else 1e-2)
    if device.type == "cpu":
        torch.testing.assert_close(out.double(), expected, atol=1e-2, rtol=1e-2)
    assert F.cosine_similarity(out.double().flatten(), expected.flatten(), 0) > 0.99


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # numpy's, about the same numbers
@pytest.mark.parametrize(("which", "bad"), [(0, float("nan")), (1, float("nan")), (1, float("inf"))])
def test_what_is_not_a_number_stays_visible(device, which, bad):
    """int8 has no NaN: the scale carries it."""
    inputs = tokens(device, 40, 40, 64)
    inputs[which][0, 1, 3, 5] = bad
    out, _ = attend(*inputs, BlockPlan.dense(40, 40), 0.1)
    assert out[0, 0].isfinite().all()
    assert out[0, 1, 3].isnan().all() if which == 0 else out[0, 1].isnan().all()


def test_aligned_plans_have_one_scale_for_a_tile_of_keys(device, monkeypatch):
    """And others one for each key: runs that start anywhere would cross the blocks of a scale."""
    used = []
    quantise = block_sparse_int8.quantize_qk
    monkeypatch.setattr(block_sparse_int8, "quantize_qk", lambda *a: used.append(a[-1]) or quantise(*a))
    n = length(device, 150)
    for kind, block in (("uniform", 32), ("small blocks", 0), ("ragged", 0)):
        inputs = tokens(device, n, n, 64)
        if device.type == "cuda":
            block = 0
        check(*inputs, *PLANS[kind](n))
        assert used.pop() == block, kind
    # A long token takes the resolution of its block alone.
    x = torch.randn(1, 2, 130, 64, device=device)
    x[:, :, 70] *= 100
    got = quantize.quantize_qk(x, x, None, None, 1.0, 32)
    assert got.k_scale.shape == (1, 2, 5) and (got.k_scale[..., 2] > 20 * got.k_scale[..., 1]).all()


def test_stand_ins_meet_the_queries_as_they_were(device):
    """Within the kernel, from keys that are not smoothed: what the merge of two results gives."""
    n = length(device, 90)
    for kind, clusters_of in (("ragged", 20), ("uniform", -(-n // 32))):
        plan = PLANS[kind](n)[0].to(device)
        q, k, v = tokens(device, n, n, 64)
        means = k.mean(2, keepdim=True) + torch.randn(1, 2, clusters_of, 64, device=device)
        stand_ins = SkippedClusters(means, torch.randn(1, 2, clusters_of, 64, device=device))
        with_them = replace(plan, skipped=stand_ins)
        out, lse = attend(q, k, v, with_them, 0.125)
        expected, expected_lse = merge(*attend(q, k, v, plan, 0.125), *attend_skipped(q, with_them, 0.125))
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(lse, expected_lse, atol=2e-4, rtol=2e-5)


# -- P V in fp8 ------------------------------------------------------------------------------------------------------


def check_fp8(q, k, v, plan, mask):
    scale = q.shape[-1] ** -0.5
    runs = (plan.tile_start, plan.tile_len, plan.run_start, plan.run_len, plan.q_order, plan.kv_order)
    operator = block_sparse_int8.block_sparse_attention_int8
    out, lse = operator(q, k, v, *runs, [], scale, fp8_values=True)
    _, same_lse = operator(q, k, v, *runs, [], scale)
    torch.testing.assert_close(lse, same_lse, atol=1e-5, rtol=1e-5)
    rounded, _ = int8_attention(q, k, v, plan, scale, fp8_values=True)
    exact, _ = masked_attention(q, k, v, mask.to(q.device), scale)
    # e4m3 rounds a weight by up to 1/16; the errors of many weights average out.
    assert F.cosine_similarity(out.double().flatten(), rounded.flatten(), 0) > 0.9993
    assert F.cosine_similarity(out.double().flatten(), exact.flatten(), 0) > 0.9985
    assert (out - exact).abs().max() < 0.06 * exact.abs().max()


def test_fp8_values(device, monkeypatch):
    """The interpreter's conversion to e4m3 loses the carry from mantissa to exponent, so torch's stands in for it."""
    if device.type == "cpu":
        import numpy
        import triton.language as tl
        from triton.runtime import interpreter

        convert = interpreter._convert_float

        def rounded(data, source, target, mode):
            if target != tl.float8e4nv:
                return convert(data, source, target, mode)
            wide = torch.from_numpy(numpy.ascontiguousarray(data).view(numpy.float32))
            return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

        monkeypatch.setattr(interpreter, "_convert_float", rounded)
    elif torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    n = length(device, 150)
    for dim, kind in ((64, "ragged"), (96, "uniform")):
        q, k, v = tokens(device, n, n, dim)
        v = v * torch.logspace(-3, 3, dim, device=device)  # channels of very different size
        plan, mask = PLANS[kind](n)
        plan = plan.to(device)
        values, scale = quantize.quantize_v(v, plan.kv_order)
        ordered = v if plan.kv_order is None else v.gather(2, plan.kv_order[..., None].expand_as(v))
        expected, expected_scale = quantize_channels(ordered)
        torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
        assert (values.float() != expected.float()).float().mean() < 1e-3
        check_fp8(q, k, v / torch.logspace(-3, 3, dim, device=device), plan, mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.gpu
def test_fp8_values_on_the_gpu(dim, dtype):
    reason = BACKENDS["triton"].unavailable(torch.device("cuda"))
    if reason or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip(reason or "needs compute capability 8.9")
    n = length(torch.device("cuda"), 150)
    plan, mask = PLANS["ragged"](n)
    check_fp8(*tokens("cuda", n, n, dim, dtype), plan.to("cuda"), mask)


# -- the interface ---------------------------------------------------------------------------------------------------


def test_auto_and_the_name_choose_the_same(device):
    n = length(device, 60)
    plan = PLANS["ragged"](n)[0].to(device)
    inputs = tokens(device, n, n, 64)
    out, lse = sparse_attention(*inputs, plan, qk="int8", return_lse=True)
    expected, expected_lse = attend(*inputs, plan, 0.125)
    assert out.equal(expected) and lse.equal(expected_lse)
    assert sparse_attention(*inputs, plan, backend="triton", qk="int8").equal(out)
    assert not sparse_attention(*inputs, plan, backend="triton").equal(out), "int8 is not the default"
    whole = sparse_attention(*inputs, BlockPlan.dense(n, n).to(device), qk="int8")
    assert not whole.equal(F.scaled_dot_product_attention(*inputs)), "nor does a dense plan leave it out"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"qk": "int4"}, ValueError, "qk='int4' is unknown: choose \"int8\""),
        ({"qk": "int8", "pv": "int8"}, ValueError, "pv='int8' is unknown: choose \"fp8\""),
        ({"pv": "fp8"}, ValueError, "pv='fp8' needs qk=\"int8\""),
        ({"qk": "int8", "backend": "nonsense"}, ValueError, "unknown backend 'nonsense'"),
        ({"qk": "int8", "backend": "flex"}, RuntimeError, "'flex' does not compute with qk='int8': use .*'triton'"),
        ({"qk": "int8", "backend": "sdpa"}, RuntimeError, "'sdpa' does not compute with qk='int8': use .*'triton'"),
        ({"qk": "int8", "pv": "fp8"}, RuntimeError, "qk='int8', pv='fp8': .*8.9 or higher, and this is the cpu"),
    ],
)
def test_bad_requests_are_named(monkeypatch, options, error, message):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # also where there is a GPU
    q, k, v = torch.randn(3, 1, 2, 20, 16)
    with pytest.raises(error, match=message):
        sparse_attention(q, k, v, BlockPlan.dense(20, 20), **options)


def test_no_gradient_is_asked_for_in_silence(device):
    q, k, v = torch.randn(3, 1, 2, 20, 16, device=device)
    plan = BlockPlan.dense(20, 20, device)
    v.requires_grad_()
    for backend in ("auto", "triton"):
        with pytest.raises(RuntimeError, match=r"'triton' has no backward with qk='int8': call it under torch.no_grad"):
            sparse_attention(q, k, v, plan, backend=backend, qk="int8")
    with torch.no_grad():
        assert sparse_attention(q, k, v, plan, qk="int8").isfinite().all()


def test_auto_says_why_nothing_can(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    q, k, v = torch.randn(3, 1, 2, 20, 16)
    with pytest.raises(RuntimeError, match="with qk='int8': backend 'triton' runs on cuda; on the cpu only in"):
        sparse_attention(q, k, v, BlockPlan.dense(20, 20), qk="int8")


@pytest.mark.parametrize(
    ("found", "runs"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), False), ((12, 0), True)]
)
def test_fp8_needs_a_gpu_that_has_it(monkeypatch, found, runs):
    from vidaccel.attention.backends import Request

    properties = SimpleNamespace(major=found[0], minor=found[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    asked = Request(torch.device("cuda"), torch.bfloat16, 128, 1000, False, False, False, Precision("int8", "fp8"))
    reason = TritonBackend().declines(asked)
    said = (
        "on Hopper, where it is slower" if found[0] == 9 else f"8.9 or higher, and this one has {found[0]}.{found[1]}"
    )
    assert reason is None if runs else said in reason
    assert TritonBackend().declines(replace(asked, precision=INT8)) is None


def test_other_backends_decline_and_say_so():
    for name, backend in BACKENDS.items():
        assert ("qk int8; pv fp8" in backend.describe()) == (name == "triton")
        if name != "triton":
            with pytest.raises(NotImplementedError, match=name):
                backend.attend_quantized(*torch.randn(3, 1, 1, 4, 8), BlockPlan.dense(4, 4), 1.0, False, INT8)


def test_compile_sees_one_operator(device):
    n = length(device, 40)
    plan = PLANS["ragged"](n)[0].to(device)
    inputs = tokens(device, n, n, 64)
    targets = []

    def keep(graph, example_inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def attention(q, k, v):
        return sparse_attention(q, k, v, plan, qk="int8")

    compiled = torch.compile(attention, fullgraph=True, backend=keep)
    assert compiled(*inputs).equal(attention(*inputs))
    assert [name for name in targets if "vidaccel" in name] == ["vidaccel.block_sparse_attention_int8.default"]
    described = (plan.tile_start, plan.tile_len, plan.run_start, plan.run_len, plan.q_order, plan.kv_order)
    operator = block_sparse_int8.block_sparse_attention_int8
    torch.library.opcheck(operator, (*inputs, *described, [], 0.1), test_utils=("test_schema", "test_faketensor"))


def test_tables_have_a_row_for_every_call():
    for table in (block_sparse_int8.INT8_TILES, block_sparse_int8.ALIGNED_TILES, block_sparse_int8.FP8_TILES):
        assert {(0, width, size) for width in (64, 128, 256) for size in (2, 4)} <= table.keys()
        for tiles in table.values():
            assert tiles.block_n >= 32, "the keys that one product of 8-bit numbers adds"
            assert not any(size & (size - 1) for size in tiles[:2])
            assert tiles.tail_n == tiles.block_n, "a tail begins at a multiple of the tile, as its scale does"


SCRIPT = """
from vidaccel.attention.kernels import block_sparse_forward as forward, block_sparse_int8 as int8, columns, quantize

architecture, dim, dtype, values, ordered = *map(int, sys.argv[1:3]), *sys.argv[3:5], sys.argv[5] == "True"
blocked = not ordered and values != "fp8e4nv"
shape = {"D": dim, "D_PAD": forward.padded(dim)}
table = int8.FP8_TILES if values == "fp8e4nv" else int8.ALIGNED_TILES if blocked else int8.INT8_TILES
width = max(64, shape["D_PAD"])
tiles = table.get((architecture // 10, width, 2)) or table[0, width, 2]
unused = {} if ordered else {"q_order_ptr": None, "kv_order_ptr": None}
unused |= {} if values == "fp8e4nv" else {"v_scale_ptr": None}
unused |= {f"{name}_ptr": None for name in ("k_tail", "v_tail")}
if values == "fp8e4nv":
    unused |= {f"{name}_ptr": None for name in ("whole_q", "skip_key", "skip_value", "skip_bias")}
unused |= {"TAIL_N": tiles.tail_n, "DESCRIBED": False, "STAND_INS": values != "fp8e4nv", "K_BLOCKED": blocked,
           "bound": None}
part = columns.part_width(architecture // 10, shape["D_PAD"], tiles, 1 if values == "fp8e4nv" else 2)
constants = {**shape, "PART": part, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "Q_ORDERED": ordered,
             "GATHER_KV": ordered and values != "fp8e4nv", **unused}
found = [compile_kernel(forward._forward_kernel, architecture, dtype, constants, tiles, q="i8", k="i8", v=values)]
small = forward.Tiles(64, 64, 4, 1)
block = {**shape, "ROWS": 64, "ORDERED": ordered, **({} if ordered else {"order_ptr": None})}
for smoothed in (False, True):
    shift = {"shift_ptr": None} if smoothed else {}
    constants = {**block, "SMOOTHED": smoothed, "BLOCKED": smoothed and blocked, **shift}
    found.append(compile_kernel(quantize._int8_kernel, architecture, dtype, constants, small, disassembled=False))
if architecture >= 89:
    found.append(compile_kernel(quantize._fp8_kernel, architecture, dtype, block, small, disassembled=False))
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("architecture", "dim", "dtype", "values", "ordered"),
    [
        pytest.param(80, 128, "bf16", "bf16", True, marks=pytest.mark.slow),
        (90, 128, "bf16", "fp8e4nv", True),
        pytest.param(120, 64, "fp16", "fp16", False, marks=pytest.mark.slow),
        pytest.param(90, 128, "bf16", "bf16", False, marks=pytest.mark.slow),
        pytest.param(89, 96, "fp16", "fp8e4nv", False, marks=pytest.mark.slow),
        pytest.param(90, 256, "bf16", "fp8e4nv", False, marks=pytest.mark.slow),
        pytest.param(100, 128, "bf16", "fp8e4nv", True, marks=pytest.mark.slow),
        pytest.param(120, 256, "bf16", "bf16", True, marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_for_gpus(tmp_path, architecture, dim, dtype, values, ordered):
    found = run_with_compiler(SCRIPT, tmp_path, architecture, dim, dtype, values, ordered)
    assert [result["kernel"] for result in found[:3]] == ["_forward_kernel", "_int8_kernel", "_int8_kernel"]
    assert len(found) == 3 + (architecture >= 89)
    for result in found:
        assert result["shared"] <= SHARED[architecture], result
    attention = found[0]
    assert attention["int8"] > 0, "the scores are not computed by the int8 tensor cores"
    assert (attention["fp8"] > 0) == (values == "fp8e4nv")
    assert attention["copies"] > 0, "the loads are not pipelined"
    if dim <= 128 and values != "fp8e4nv":
        assert not any(loop["spills"] for loop in attention["loops"]), "registers go to memory within a loop"
        assert not attention["split"], "rows are dealt to several warps, and their sums go through shared memory"
