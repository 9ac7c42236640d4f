"""Gradients of the kernels against autograd through masked attention in float64; one operator under `torch.compile`."""

from __future__ import annotations

import pytest
import torch
from fast_set import fast
from plans import clusters, masked_attention, uniform
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from vidaccel import BlockPlan, sparse_attention
from vidaccel.attention.backends.triton import TritonBackend

pytest.importorskip("triton")

from vidaccel.attention.kernels import block_sparse, block_sparse_backward, readers

# Relative to the largest gradient.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}
ON_GPU = 16


def length(device: torch.device, n: int) -> int:
    return n * ON_GPU if device.type == "cuda" else n


def tokens(device, n_q, n_kv, dim, dtype=torch.float32, batch=1, heads=2):
    return [torch.randn(batch, heads, n, dim).to(device, dtype).requires_grad_() for n in (n_q, n_kv, n_kv)]


def expected_gradients(inputs, mask, scale, weight, weight_lse):
    """Autograd in float64. Rows without keys read everything with a weight of zero, or autograd itself makes NaN."""
    mask = mask.to(inputs[0].device)
    rows = mask.any(-1)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    out, lse = masked_attention(*wide, mask | ~rows.unsqueeze(-1), scale)
    loss = (out * weight * rows.unsqueeze(-1)).sum() + (lse * weight_lse * rows).sum()
    return torch.autograd.grad(loss, wide)


def check(inputs, plan, mask, through_lse=False, backend=None):
    q = inputs[0]
    scale = 0.8 * q.shape[-1] ** -0.5
    weight = torch.randn(q.shape, device=q.device, dtype=q.dtype)
    weight_lse = torch.randn(q.shape[:3], device=q.device) * through_lse
    out, lse = (backend or TritonBackend()).attend(*inputs, plan.to(q.device), scale, True)
    loss = (out * weight).sum()
    if through_lse:
        loss = loss + (lse * weight_lse).masked_fill(lse == float("-inf"), 0.0).sum()
    got = torch.autograd.grad(loss, inputs)
    for x, one, other in zip(inputs, got, expected_gradients(inputs, mask, scale, weight, weight_lse), strict=True):
        assert one.dtype == x.dtype and one.shape == x.shape
        assert (one - other).abs().max() <= TOLERANCE[q.dtype] * other.abs().max().clamp(min=1.0)
    return got


PLANS = {
    "uniform": lambda n: uniform(1, 2, n, n, 32, 32),
    "small blocks": lambda n: uniform(1, 2, n, n, 8, 5, share=0.3),
    "broadcast": lambda n: uniform(1, 1, n, n, 20, 16),
    "ragged": lambda n: clusters(1, 2, n, n, 5, 20),
    "skewed": lambda n: clusters(1, 2, n, n, 6, 20, skew=8.0),
    "all": lambda n: uniform(1, 1, n, n, 32, 32, share=1.1),
    "nearly nothing": lambda n: uniform(1, 2, n, n, 16, 1, share=0.02),
}


@pytest.mark.parametrize("kind", PLANS)
def test_gradients_on_every_kind_of_plan(device, kind):
    n = length(device, 85)
    check(tokens(device, n, n, 64), *PLANS[kind](n))


@pytest.mark.parametrize("kind", ["ragged", "uniform"])
def test_gradients_through_the_log_sum_exp(device, kind):
    n = length(device, 50)
    check(tokens(device, n, n, 64), *PLANS[kind](n), through_lse=True)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_half_precision_gradients(device, dtype):
    n = length(device, 60)
    check(tokens(device, n, n, 64, dtype), *PLANS["ragged"](n))


def test_gradients_of_keys_in_blocks_of_two_words(device):
    n = length(device, 180)
    assert block_sparse_backward.words_of(block_sparse_backward.KEY_TILES[0, 128, 2].block_n) == 2
    check(tokens(device, n, n, 128, torch.float16, heads=1), *clusters(1, 1, n, n, 4, 9))


@pytest.mark.parametrize("dim", [40, 96, 128])
def test_head_dimensions_and_cross_lengths(device, dim):
    n_q, n_kv = length(device, 30), length(device, 70)
    check(tokens(device, n_q, n_kv, dim), *clusters(1, 2, n_q, n_kv, 4, 9))


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.gpu
def test_every_configuration_on_the_gpu(dim, dtype):
    n = length(torch.device("cuda"), 120)
    for kind in ("ragged", "uniform"):
        check(tokens("cuda", n, n, dim, dtype), *PLANS[kind](n), through_lse=True)


def test_gradients_with_broadcast_orders_and_batches(device):
    n = length(device, 40)
    plan = BlockPlan.from_block_mask(torch.rand(2, 1, 5, 5) < 0.5, n // 5, n // 5, n, n)
    order = torch.stack([torch.randperm(n) for _ in range(3)]).view(1, 3, n)
    plan = BlockPlan(n, n, plan.tile_start, plan.tile_len, plan.run_start, plan.run_len, order, order.flip(1))
    inputs = tokens(device, n, n, 64, batch=2, heads=3)
    check(inputs, plan, plan.to_dense_mask(), backend=TritonBackend(gather_kv=True))
    check(inputs, plan, plan.to_dense_mask())


def test_gradients_of_strided_inputs(device):
    n = length(device, 40)
    plan, mask = PLANS["ragged"](n)
    packed = torch.randn(1, n, 3, 2, 64, device=device).requires_grad_()
    check([x.transpose(1, 2) for x in packed.unbind(2)], plan, mask)


def test_gradients_are_the_same_bits_every_time(device):
    n = length(device, 60)
    plan = PLANS["skewed"](n)[0].to(device)
    inputs = tokens(device, n, n, 64)
    runs = [torch.autograd.grad(TritonBackend().attend(*inputs, plan, 0.1, False)[0].sum(), inputs) for _ in range(2)]
    assert all(one.equal(other) for one, other in zip(*runs, strict=True))


def test_key_blocks_know_their_readers(device):
    """The transposed plan says of every pair what the plan says, also for blocks of a word or two read in part."""
    for block_n in (16, 64, 128):
        plan, _ = clusters(1, 2, 90, 150, 5, 40)
        plan = plan.to(device)
        found = readers.make_readers(plan, 16, block_n)
        keys = plan.keys_of_tile()
        bits = (found.bits.unsqueeze(-1) >> torch.arange(min(64, block_n), device=device) & 1).flatten(-2)
        assert bits.flatten(-2)[..., :150].bool().equal(keys[0])
        assert not bits.flatten(-2)[..., 150:].any()
        for h in range(2):
            for block in range(bits.shape[-2]):
                reading = bits[h, :, block].any(-1) & (plan.tile_len[0, h] > 0)
                count = int(reading.sum())
                assert found.readers[h, block, :count].tolist() == reading.nonzero().flatten().tolist()
                pieces = (plan.tile_len[0, h][reading] + 15) // 16
                assert found.steps[h, block] == pieces.sum()
        assert (found.steps.gather(-1, found.block.long()).diff() <= 0).all()


@pytest.mark.parametrize("size", [63, 64, 65])
def test_a_run_may_fill_a_block_of_64_keys_to_the_last_bit(device, size):
    """Bits 62 and 63 of a word are where shifts go wrong."""
    start, one = torch.zeros(1, 1, 1, 1, dtype=torch.int32), torch.ones(1, 1, 1, dtype=torch.int32)
    for first in (0, 1, 62, 63):
        plan = BlockPlan(1, 200, one * 0, one, start + first, start + size).to(device)
        bits = readers.make_readers(plan, 16, 64).bits.unsqueeze(-1) >> torch.arange(64, device=device)
        assert (bits & 1).flatten()[:200].bool().equal(plan.keys_of_tile().flatten())


LEADS = {"one": (1, 1), "of heads": (1, 2), "of batch": (2, 1), "of both": (2, 2)}
AT_A_TIME = [(most, lead) for most in (1, 250, 2**26) for lead in LEADS]
FAST = {(1, "of both"), (250, "of heads"), (250, "of batch"), (2**26, "one"), (2**26, "of both")}


@pytest.mark.parametrize(("most", "lead"), fast(FAST, AT_A_TIME))
def test_readers_are_made_for_some_heads_at_a_time(device, monkeypatch, lead, most):
    """And never are the tables larger than that, but where those of one head are."""
    held, lead = [], LEADS[lead]
    make = readers.make_readers

    def made(*arguments):
        tables = make(*arguments)
        held.append(sum(x.numel() * x.element_size() for x in (tables.bits, tables.readers)))
        return tables

    monkeypatch.setattr(readers, "make_readers", made)
    monkeypatch.setattr(readers, "READERS_BYTES", most)
    n = length(device, 60)
    mask = torch.rand(*lead, -(-n // 16), -(-n // 16)) < 0.6
    mask[..., 0] = True
    plan = BlockPlan.from_block_mask(mask, 16, 16, n, n).to(device)
    dense = mask.repeat_interleave(16, -2).repeat_interleave(16, -1)[..., :n, :n].to(device)
    for times in (1, 2):  # two layers or steps that share a plan
        inputs = [torch.randn(2, 2, n, 16, device=device, requires_grad=True) for _ in range(3)]
        found = torch.autograd.grad(TritonBackend().attend(*inputs, plan, 0.2, False)[0].square().sum(), inputs)
        wanted = torch.autograd.grad(masked_attention(*inputs, dense, 0.2)[0].square().sum(), inputs)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one.double(), other.double(), atol=2e-4, rtol=2e-4)
        if device.type == "cpu":  # a head's tables take 104 bytes
            at_once = max(1, most // 104)
            kept = lead == (1, 1) and most > 104
            assert len(held) == (1 if kept else times * -(-lead[0] * lead[1] // at_once))
            assert max(held) <= max(most, 104)


def test_compile_sees_one_operator(device):
    n = length(device, 40)
    plan = PLANS["ragged"](n)[0].to(device)
    inputs = tokens(device, n, n, 64)
    graphs = []

    def attention(q, k, v):
        return sparse_attention(q + 0, k, v, plan, backend="triton")

    def keep(graph, example_inputs):
        graphs.append(
            [str(node.target) for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        )
        return make_boxed_func(graph.forward)

    torch.compile(attention, fullgraph=True, backend=aot_autograd(fw_compiler=keep))(*(x.detach() for x in inputs))
    assert graphs == [["aten.add.Tensor", "vidaccel.block_sparse_attention.default"]]

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*inputs), attention(*inputs)
    assert out.equal(expected)
    for one, other in zip(*(torch.autograd.grad(x.sum(), inputs) for x in (out, expected)), strict=True):
        assert one.equal(other)


def test_operators_keep_the_promises_of_their_registration(device):
    n = length(device, 24)
    plan = clusters(1, 1, n, n, 3, 5)[0].to(device)
    inputs = tokens(device, n, n, 16, heads=1)
    described = (plan.tile_start, plan.tile_len, plan.run_start, plan.run_len, plan.q_order, plan.kv_order)
    rest = (False, None, None, None, None)  # orders applied beforehand, no stand-ins, no second stage
    torch.library.opcheck(block_sparse.block_sparse_attention, (*inputs, *described, [], [], 0.1, *rest))
    detached = [x.detach() for x in inputs]
    out, lse = block_sparse.block_sparse_attention(*detached, *described, [], [], 0.1, *rest)
    grads = (torch.randn_like(out), torch.randn_like(lse))
    arguments = (*grads, *detached, *described, None, None, None, out, lse, [], 0.1)
    torch.library.opcheck(block_sparse_backward.block_sparse_attention_backward, arguments)
