from __future__ import annotations

import copy
import io

import pytest
import torch
from plans import clusters, uniform

from vidaccel import BlockPlan, sparse_attention
from vidaccel.attention.block_mask import to_block_mask

SHAPES = [(1, 1, 64, 64), (2, 3, 75, 83), (1, 2, 7, 130)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lead", ["full", "broadcast"])
def test_uniform_blocks_mean_their_mask(shape, lead):
    batch, heads, n_q, n_kv = shape
    plan, mask = uniform(*((1, 1) if lead == "broadcast" else (batch, heads)), n_q, n_kv, 16, 12)
    assert plan.validate().to_dense_mask().equal(mask)
    assert plan.density() == pytest.approx(mask.double().mean().item(), abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("skew", [1.0, 6.0])
def test_clusters_mean_their_mask(shape, skew):
    plan, mask = clusters(*shape, c_q=9, c_k=30, share=0.4, skew=skew)
    assert plan.validate().to_dense_mask().equal(mask)
    assert plan.density() == pytest.approx(mask.double().mean().item(), abs=1e-12)


def test_neighbouring_clusters_merge_into_one_run_across_empty_ones():
    sizes = torch.tensor([[[4, 0, 3, 5, 2]]])
    selected = torch.tensor([[[[True, False, True, False, True]]]])
    plan = BlockPlan.from_clusters(torch.tensor([[[6]]]), sizes, selected)
    runs = list(zip(plan.run_start.flatten().tolist(), plan.run_len.flatten().tolist(), strict=True))
    assert runs == [(0, 7), (12, 2)]


def test_a_dense_plan_is_dense():
    plan = BlockPlan.dense(5, 9)
    assert plan.density() == 1.0 and plan.is_dense and plan.validate().to_dense_mask().all()


def test_rows_are_rows_of_the_mask():
    plan, mask = clusters(2, 2, 75, 83, 9, 20)
    rows = torch.tensor([0, 74, 13])
    assert plan.rows(rows).equal(mask[:, :, rows])


@pytest.mark.parametrize("rows", [1, 8, 64, 200])
def test_cut_covers_every_query_once_with_the_tile_it_belongs_to(rows):
    plan, _ = clusters(2, 2, 75, 83, 9, 20, skew=4.0)
    start, length, tile = plan.cut(rows)
    assert length.max() <= rows
    owner = plan.tile_of_query()
    for b in range(2):
        for h in range(2):
            pieces = [
                (s, n, t) for s, n, t in zip(*(x[b, h].tolist() for x in (start, length, tile)), strict=True) if n
            ]
            assert [i for s, n, _ in pieces for i in range(s, s + n)] == list(range(75))
            assert all(owner[b, h, s : s + n].eq(t).all() for s, n, t in pieces)


@pytest.mark.parametrize("block", [(32, 32), (16, 12), (128, 128)])
def test_block_mask_agrees_with_the_plan(block):
    """FlexAttention's own expansion of the mask function is what the plan says, and no needed block is left out."""
    from torch.nn.attention.flex_attention import create_mask

    plan, _ = clusters(2, 3, 75, 83, 9, 20, share=0.3, skew=3.0)
    mask = to_block_mask(plan, block)
    permuted = plan.keys_of_tile().gather(2, plan.tile_of_query().unsqueeze(-1).expand(-1, -1, -1, 83))
    assert create_mask(mask.mask_mod, 2, 3, 75, 83, device="cpu").equal(permuted)

    touched = torch.nn.functional.pad(permuted, (0, -83 % block[1], 0, -75 % block[0]))
    touched = touched.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0])).any(-1).any(-2)
    assert mask.to_dense().bool().equal(touched)


def test_block_masks_are_built_once():
    plan, _ = uniform(1, 1, 64, 64, 16, 16)
    assert to_block_mask(plan, 32) is to_block_mask(plan, (32, 32))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockPlan.dense(0, 4), "n_q=0"),
        (lambda: BlockPlan.from_block_mask(torch.ones(2, 2), 16, 16, 32, 32), "bool"),
        (lambda: BlockPlan.from_block_mask(torch.ones(2, 2).bool(), 16, 16, 33, 32), r"make \(3, 2\)"),
        (lambda: BlockPlan.from_block_mask(torch.ones(2, 2).bool(), 0, 16, 33, 32), "block size is 0"),
        (
            lambda: BlockPlan.from_clusters(
                torch.tensor([[[4], [5]]]), torch.tensor([[[4], [4]]]), torch.ones(1, 2, 1, 1).bool()
            ),
            r"add up to \[4, 5\]",
        ),
        (
            lambda: BlockPlan.from_clusters(torch.ones(1, 1, 3), torch.ones(1, 1, 3), torch.ones(1, 1, 3).bool()),
            "from_clusters needs",
        ),
    ],
)
def test_bad_plans_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_runs_that_have_no_place_are_refused():
    crossed = torch.eye(6, dtype=torch.bool) | torch.eye(6, dtype=torch.bool).flip(0)
    assert BlockPlan.from_block_mask(crossed, 8, 8, 48, 48, max_runs=2).density() == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match=r"max_runs is 1, but a tile reads 2 runs of keys: give 2, or None\."):
        BlockPlan.from_block_mask(crossed, 8, 8, 48, 48, max_runs=1)
    with pytest.raises(ValueError, match="max_runs is 0: it must be at least 1"):
        BlockPlan.from_block_mask(crossed, 8, 8, 48, 48, max_runs=0)


def test_negative_clusters_and_wide_numbers_are_refused():
    sizes = torch.tensor([[[60, -12]]])
    with pytest.raises(ValueError, match="the q cluster sizes must not be negative, got -12"):
        BlockPlan.from_clusters(sizes, sizes, torch.ones(1, 1, 2, 2, dtype=torch.bool), n_q=48, n_kv=48)
    with pytest.raises(ValueError, match=r"needs selected as bool, got torch\.int64"):
        BlockPlan.from_clusters(sizes.abs(), sizes.abs(), torch.ones(1, 1, 2, 2, dtype=torch.int64))
    zero = torch.zeros(1, 1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"BlockPlan\.run_len must be int32, got torch\.int64"):
        BlockPlan(48, 48, zero, zero + 48, zero[..., None], zero[..., None].long() + 48)
    back = torch.tensor([[[0, 60]]], dtype=torch.int32), torch.tensor([[[60, -12]]], dtype=torch.int32)
    with pytest.raises(ValueError, match="cover each query"):
        BlockPlan(48, 48, *back, torch.zeros_like(back[0])[..., None], torch.ones_like(back[0])[..., None]).validate()


def test_validate_finds_broken_promises():
    plan, _ = clusters(1, 1, 20, 20, 3, 4, share=0.9)
    twice = torch.zeros(1, 1, 20, dtype=torch.int64)
    with pytest.raises(ValueError, match="not a permutation"):
        BlockPlan(20, 20, plan.tile_start, plan.tile_len, plan.run_start, plan.run_len, twice).validate()
    with pytest.raises(ValueError, match="cover each query"):
        BlockPlan(20, 20, plan.tile_start + 1, plan.tile_len, plan.run_start, plan.run_len).validate()
    with pytest.raises(ValueError, match="leaves the 20 keys"):
        BlockPlan(20, 20, plan.tile_start, plan.tile_len, plan.run_start, plan.run_len + 20).validate()
    both = torch.cat([plan.run_start] * 2, -1), torch.cat([plan.run_len] * 2, -1)
    with pytest.raises(ValueError, match="overlap"):
        BlockPlan(20, 20, plan.tile_start, plan.tile_len, *both).validate()


def of_one_tile(runs: list[tuple[int, int]]) -> BlockPlan:
    start, length = (torch.tensor([[[list(x)]]], dtype=torch.int32) for x in zip(*runs, strict=True))
    tile = torch.zeros(1, 1, 1, dtype=torch.int32)
    return BlockPlan(4, 8, tile, tile + 4, start, length)


def test_runs_ascend_and_padding_may_stand_anywhere():
    """`gather` cuts keys from the first run to the last: it ended in an error of torch."""
    with pytest.raises(ValueError, match="do not ascend: sort them by their starts"):
        of_one_tile([(5, 3), (0, 2)]).validate()
    with pytest.raises(ValueError, match="overlap"):
        of_one_tile([(0, 5), (7, 0), (4, 2)]).validate()
    plan = of_one_tile([(7, 0), (0, 2), (1, 0), (2, 3), (0, 0), (7, 1)]).validate()
    assert plan.to_dense_mask()[0, 0, 0].int().tolist() == [1, 1, 1, 1, 1, 0, 0, 1]
    q, k, v = torch.randn(1, 2, 4, 16), *torch.randn(2, 1, 2, 8, 16)
    outs = [sparse_attention(q, k, v, plan, backend=name) for name in ("reference", "gather", "masked")]
    assert all(torch.allclose(out, outs[0], atol=1e-5) for out in outs)


def test_a_plan_has_a_tile_and_a_run_at_least():
    """Kernels read the first of each."""
    tile = torch.zeros(1, 1, 1, dtype=torch.int32)
    none = tile[..., None][..., :0]
    with pytest.raises(ValueError, match=r"of at least 1 each, got \(1, 1, 1, 0\): a tile that reads nothing has one"):
        BlockPlan(4, 8, tile, tile + 4, none, none)
    none = tile[..., :0]
    with pytest.raises(ValueError, match=r"of at least 1 each, got \(1, 1, 0, 1\)"):
        BlockPlan(4, 8, none, none, none[..., None], none[..., None])


@pytest.mark.parametrize(
    ("name", "lead", "message"),
    [
        ("q_order", (3, 1), r"number of batch entries, or 1 .* got the tiles for 2, q_order for 3"),
        ("kv_order", (3, 1), r"number of batch entries, or 1 .* got the tiles for 2, kv_order for 3"),
        ("q_order", (1, 3), r"number of heads, or 1 .* got the tiles for 4, q_order for 3"),
        ("kv_order", (1, 3), r"kv_order is for 3 heads or groups of them, which must divide the 4 heads"),
    ],
)
def test_orders_of_other_heads_or_batch_entries_than_the_tiles_are_refused(name, lead, message):
    tile = torch.zeros(2, 4, 1, dtype=torch.int32)
    order = torch.arange(8).expand(*lead, 8)
    with pytest.raises(ValueError, match=message):
        BlockPlan(8, 8, tile, tile + 8, tile[..., None], tile[..., None] + 8, **{name: order})
    BlockPlan(8, 8, tile, tile + 8, tile[..., None], tile[..., None] + 8, **{name: order[:1, :1]}).validate()


def saved(plan: BlockPlan) -> bytes:
    file = io.BytesIO()
    torch.save(plan, file)
    return file.getvalue()


def test_a_plan_is_written_and_copied_without_what_backends_keep_on_it():
    """With it, it became hundreds of times as large, or could not be written at all."""
    plan, mask = uniform(1, 1, 256, 256, 16, 16, share=0.3)
    before, q = len(saved(plan)), torch.randn(1, 1, 256, 16)
    out = sparse_attention(q, q, q, plan, backend="masked")
    to_block_mask(plan, 128)
    assert plan._masks and plan._block_masks and len(saved(plan)) == before
    read = torch.load(io.BytesIO(saved(plan)), weights_only=False)
    for other in (read, copy.copy(plan), copy.deepcopy(plan)):
        assert other.validate().to_dense_mask().equal(mask) and not other._masks and not other._block_masks
        assert sparse_attention(q, q, q, other, backend="masked").equal(out)
    assert plan._masks  # those of the plan itself stay
