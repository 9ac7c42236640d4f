"""The forward kernel against the definition in float64: tiny in Triton's interpreter, at real sizes on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from plans import KINDS, clusters, masked_attention

from vidaccel import BlockPlan
from vidaccel.attention import SVG, SVG2, PlanMemory, Radial, VideoLayout
from vidaccel.attention.backends.triton import TritonBackend

pytest.importorskip("triton")

from vidaccel.attention.kernels import launch
from vidaccel.attention.kernels.walk import make_walk

# Relative to outputs of size one; on the GPU sums are longer and bfloat16 is among the dtypes.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
ON_GPU = 24  # how many times longer the sequences are there


def length(device: torch.device, n: int) -> int:
    return n * ON_GPU if device.type == "cuda" else n


def tokens(device, n_q, n_kv, dim, dtype=torch.float32, batch=1, heads=2):
    return [torch.randn(batch, heads, n, dim).to(device, dtype) for n in (n_q, n_kv, n_kv)]


def check(q, k, v, plan, mask, backend=None, tolerance=None):
    """Compare output and log-sum-exp with masked attention."""
    scale = 0.9 * q.shape[-1] ** -0.5
    out, lse = (backend or TritonBackend()).attend(q, k, v, plan.to(q.device), scale, True)
    expected, expected_lse = masked_attention(q, k, v, mask.to(q.device), scale)
    tolerance = tolerance or TOLERANCE[q.dtype]
    assert out.shape == q.shape and out.dtype == q.dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=tolerance, rtol=tolerance)
    return out


def one_giant(n):
    """One cluster holds all but a few tokens, most clusters are empty."""
    sizes = torch.zeros(1, 1, 9, dtype=torch.int64)
    sizes[..., 1], sizes[..., 4] = n - 5, 5
    selected = torch.zeros(1, 1, 9, 9, dtype=torch.bool)
    selected[..., 1, 4] = selected[..., 4, 1] = selected[..., 1, 2] = True
    plan = BlockPlan.from_clusters(sizes, sizes, selected)
    label = torch.tensor([1] * (n - 5) + [4] * 5)
    return plan, selected[0, 0][label][:, label].expand(1, 1, n, n)


def text_rows(n, text=11):
    """Video in blocks of 16, text behind it that reads and is read by everything."""
    edges = list(range(0, n - text, 16)) + [n - text]
    sizes = torch.tensor([b - a for a, b in itertools.pairwise(edges)] + [text]).expand(1, 1, -1)
    count = sizes.shape[-1]
    selected = torch.eye(count, dtype=torch.bool)
    selected[-1], selected[:, -1] = True, True
    label = torch.arange(count).repeat_interleave(sizes[0, 0])
    return BlockPlan.from_clusters(sizes, sizes, selected.expand(1, 1, -1, -1)), selected[label][:, label][None, None]


def with_gaps(n):
    """Padding in the middle of tiles and of runs, as a method may leave it."""
    tile_start = torch.tensor([[[0, 20, 20]]], dtype=torch.int32)
    tile_len = torch.tensor([[[20, 0, n - 20]]], dtype=torch.int32)
    run_start = torch.tensor([[[[0, 40, 40, 60], [0, 0, 0, 0], [0, 3, 9, 40]]]], dtype=torch.int32)
    run_len = torch.tensor([[[[0, 3, 0, n - 60], [0, 0, 0, 0], [1, 0, 30, 0]]]], dtype=torch.int32)
    plan = BlockPlan(n, n, tile_start, tile_len, run_start, run_len).validate()
    return plan, plan.to_dense_mask()


PLANS = {
    **KINDS,
    "one giant": one_giant,
    "text": text_rows,
    "gaps": with_gaps,
}


@pytest.mark.parametrize("kind", PLANS)
def test_every_kind_of_plan(device, kind):
    n = length(device, 101)
    check(*tokens(device, n, n, 64), *PLANS[kind](n))


def test_runs_of_several_whole_tiles(device):
    """Long runs one after the other, each with a tail, also between short ones."""
    n_q, n_kv = length(device, 20), length(device, 260)
    third, short = n_kv // 3 - 6, n_kv // 13
    plan = BlockPlan(
        n_q,
        n_kv,
        torch.tensor([[[0, 5]]], dtype=torch.int32),
        torch.tensor([[[5, n_q - 5]]], dtype=torch.int32),
        torch.tensor([[[[0, third + 1, 2 * third + 5], [1, short + 3, n_kv - short]]]], dtype=torch.int32),
        torch.tensor([[[[third, third, third], [short, 2 * third, short]]]], dtype=torch.int32),
    ).validate()
    check(*tokens(device, n_q, n_kv, 64), plan, plan.to_dense_mask())


@pytest.mark.parametrize("n", [1, 7, 15, 17])
def test_sequences_shorter_than_a_tile(device, n):
    check(*tokens(device, n, n, 64), *clusters(1, 2, n, n, 3, 4, share=0.7))


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", ["ragged", "uniform"])
def test_half_precision_stays_within_its_error(device, dtype, kind):
    n = length(device, 90)
    check(*tokens(device, n, n, 64, dtype), *PLANS[kind](n))


@pytest.mark.parametrize("dim", [16, 40, 96, 128, 256])
def test_head_dimensions(device, dim):
    n = length(device, 50)
    check(*tokens(device, n, n, dim), *PLANS["ragged"](n))


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.gpu
def test_every_configuration_on_the_gpu(dim, dtype):
    n = length(torch.device("cuda"), 150)
    for kind in ("ragged", "uniform", "text"):
        check(*tokens("cuda", n, n, dim, dtype), *PLANS[kind](n))


def test_cross_lengths(device):
    n_q, n_kv = length(device, 40), length(device, 90)
    check(*tokens(device, n_q, n_kv, 64), *clusters(1, 2, n_q, n_kv, 4, 9))


def test_dense_plan_is_dense_attention(device):
    n = length(device, 70)
    q, k, v = tokens(device, n, n, 64)
    check(q, k, v, BlockPlan.dense(n, n), torch.ones(1, 1, n, n, dtype=torch.bool))


def test_plans_and_orders_broadcast_over_batch_and_heads(device):
    """Orders per head with runs for all heads, runs per batch entry with orders for all."""
    n = length(device, 48)
    blocks = torch.rand(1, 1, 6, 6) < 0.5
    plan = BlockPlan.from_block_mask(blocks, n // 6, n // 6, n, n)
    order = torch.stack([torch.randperm(n) for _ in range(3)]).view(1, 3, n)
    by_head = BlockPlan(n, n, plan.tile_start, plan.tile_len, plan.run_start, plan.run_len, order, order.flip(1))
    check(*tokens(device, n, n, 64, batch=2, heads=3), by_head, by_head.to_dense_mask())

    blocks = torch.rand(2, 1, 6, 6) < 0.5
    plan = BlockPlan.from_block_mask(blocks, n // 6, n // 6, n, n)
    order = torch.randperm(n).view(1, 1, n)
    by_batch = BlockPlan(n, n, plan.tile_start, plan.tile_len, plan.run_start, plan.run_len, None, order)
    check(*tokens(device, n, n, 64, batch=2, heads=3), by_batch, by_batch.to_dense_mask())


@pytest.mark.parametrize("kind", ["ragged", "uniform"])
def test_keys_read_through_their_order_give_the_same_bits(device, kind):
    n = length(device, 80)
    inputs = tokens(device, n, n, 64)
    plan, mask = PLANS[kind](n)
    gathered = check(*inputs, plan, mask, TritonBackend(gather_kv=True))
    assert gathered.equal(check(*inputs, plan, mask))


def test_strided_inputs_and_the_layout_of_the_output(device):
    n = length(device, 60)
    plan, mask = PLANS["ragged"](n)
    packed = torch.randn(1, n, 3, 2, 64, device=device)
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    out = check(q, k, v, plan, mask)
    assert out.transpose(1, 2).is_contiguous(), "the output of [B, N, H, D] memory is [B, N, H, D] memory"
    columns = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
    assert columns[0].stride(-1) != 1
    assert check(*columns, plan, mask).equal(out)
    broadcast = check(q.expand(3, -1, -1, -1), *(x.expand(3, -1, -1, -1) for x in (k, v)), plan, mask)
    assert broadcast.equal(out.expand(3, -1, -1, -1))


def test_rows_without_keys_give_zero_and_minus_infinity(device, monkeypatch):
    """Into memory full of NaN, so that nothing is left unwritten."""
    n = length(device, 70)
    blocks = torch.zeros(7, 7, dtype=torch.bool)
    blocks[1:, 0] = True
    plan = BlockPlan.from_block_mask(blocks, n // 7, n // 7, n, n)
    empty_like, empty = torch.empty_like, torch.empty

    def fill(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    out, lse = TritonBackend().attend(*tokens(device, n, n, 64), plan.to(device), 0.1, True)
    assert out[:, :, : n // 7].eq(0).all() and lse[:, :, : n // 7].eq(float("-inf")).all()
    assert out[:, :, n // 7 :].isfinite().all() and lse[:, :, n // 7 :].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_scores_do_not_overflow(device, dtype):
    n = length(device, 40)
    q, k, v = tokens(device, n, n, 64, dtype)
    plan, mask = PLANS["ragged"](n)
    check(q * 30, k * 30, v, plan, mask, tolerance=2e-3)


def listed(starts, sizes):
    """The entries of a list of the walk, whose first size of 0 ends it; what lies behind is not written."""
    return list(itertools.takewhile(lambda entry: entry[1] > 0, zip(starts.tolist(), sizes.tolist(), strict=True)))


def test_the_walk_holds_exactly_the_keys_of_the_plan():
    """Whole tiles and tails put together again, and the pieces: each query once, those with most keys first."""
    plan, _ = clusters(2, 2, 90, 100, 5, 20)
    walk = make_walk(plan, 16, 8, 8)
    keys = plan.keys_of_tile()
    for b, h in ((0, 0), (0, 1), (1, 0), (1, 1)):
        for tile in range(keys.shape[2]):
            found = []
            whole = listed(walk.full_start[b, h, tile], walk.full_tiles[b, h, tile])
            for start, count in whole:
                found += range(start, start + 8 * count)
            tails = listed(walk.tail_start[b, h, tile], walk.tail_len[b, h, tile])
            for start, size in tails:
                found += range(start, start + size)
            assert sorted(found) == keys[b, h, tile].nonzero().flatten().tolist()
            assert walk.full_count[b, h, tile] == sum(count for _, count in whole)
            assert walk.tail_count[b, h, tile] == len(tails)
        real = walk.piece_len[b, h] > 0
        queries = [
            q
            for start, size in zip(walk.piece_start[b, h][real], walk.piece_len[b, h][real], strict=True)
            for q in range(int(start), int(start + size))
        ]
        assert sorted(queries) == list(range(90)) and walk.piece_len[b, h].max() <= 16
        tiles = walk.piece_tile[b, h].long()
        work = (walk.full_count + walk.tail_count)[b, h][tiles].masked_fill(~real, -1)
        assert (work.diff() <= 0).all()


@pytest.mark.parametrize("table", ["FORWARD_TILES", "QUERY_TILES", "KEY_TILES"])
def test_tables_have_a_row_for_every_call(table):
    from vidaccel.attention.kernels import block_sparse_backward, block_sparse_forward

    tables = getattr(block_sparse_backward if table != "FORWARD_TILES" else block_sparse_forward, table)
    for dim in (8, 64, 72, 128, 200, 256):
        for dtype in (torch.float16, torch.float32):
            tiles = launch.choose_tiles(tables, torch.empty(1, 1, 60, dim, dtype=dtype), torch.empty(1, 1, 3))
            assert tiles.block_m in (16, 32), "a mean of 20 queries a tile needs no 64 rows"
    for tiles in tables.values():
        for size in (tiles.block_m, tiles.block_n):
            assert size >= 16 and size & (size - 1) == 0
        assert table != "KEY_TILES" or tiles.block_n <= 128, "one bit a key, in at most two words"


@pytest.mark.parametrize("method", [Radial(8, sink=False), SVG(density=0.4), SVG2(density=0.4)], ids=lambda m: m.name)
def test_plans_of_the_methods(device, method):
    """Text before and after a video whose frames are no multiple of any tile."""
    size = 12 if device.type == "cuda" else 3
    layout = VideoLayout(6, size, 5, text_before=3, text_after=7)
    q, k, v = (torch.randn(1, 2, layout.tokens, 64, device=device) for _ in range(3))
    plan = method.plan(q, k, v, layout, PlanMemory())
    check(q, k, v, plan, plan.to_dense_mask())
