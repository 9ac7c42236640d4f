"""The second stage of SpargeAttn: which tiles are left out within the softmax, and how little that changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from gpu_compiler import SHARED, run_with_compiler
from plans import KINDS, masked_attention

pytest.importorskip("triton")

import vidaccel
from vidaccel import BlockPlan, DenseSchedule, Sparge, VideoLayout, sparse_attention
from vidaccel.attention import BACKENDS, PlanMemory, SparseAttention, StepInfo
from vidaccel.attention.kernels.block_sparse_forward import forward_tiles, launch_forward, results
from vidaccel.attention.kernels.block_sparse_int8 import int8_tiles
from vidaccel.attention.kernels.launch import LOG2E, Tiles
from vidaccel.attention.orders import unpermute
from vidaccel.generation.errors import BadInput

ON_GPU = 12
SCALE, BOUND = 0.125, 6.0


def falling(device, kind="all", dim=64, dtype=torch.float32):
    """A plan, and tokens whose scores fall from 10 to -10 along its keys, so that later tiles hardly count."""
    n = 150 * ON_GPU if device.type == "cuda" else 150
    plan = KINDS[kind](n)[0].to(device)
    direction = F.normalize(torch.randn(1, 2, 1, dim), dim=-1)
    height = torch.linspace(10, -10, n).view(1, 1, n, 1)
    q = direction + 0.3 * torch.randn(1, 2, n, dim) / dim**0.5
    k = (direction * height + 0.3 * torch.randn(1, 2, n, dim)) / SCALE
    q, k, v = (x.to(device, dtype) for x in (q, k, torch.randn(1, 2, n, dim)))
    return plan, q, unpermute(k, plan.kv_order), v


def left_out(q, k, plan, scale, bound, tiles):
    """The mask of the pairs that the kernel reads, written out: piece by piece, tile by tile, in its order."""
    batch, heads, n, _ = q.shape
    mask = torch.zeros(batch, heads, n, k.shape[2], dtype=torch.bool)
    scores = (q.double() @ k.double().transpose(-1, -2) * scale).cpu()
    entry = [
        x.expand(*plan.lead, *x.shape[2:]).cpu() for x in (plan.tile_start, plan.tile_len, plan.run_start, plan.run_len)
    ]
    orders = [
        torch.arange(size).expand(batch, heads, size) if order is None else order.cpu().expand(batch, heads, size)
        for order, size in ((plan.q_order, n), (plan.kv_order, k.shape[2]))
    ]
    for b in range(batch):
        for h in range(heads):
            at = (b if plan.lead[0] > 1 else 0, h if plan.lead[1] > 1 else 0)
            for start, size, run_start, run_len in zip(*(x[at].tolist() for x in entry), strict=True):
                walk = []
                for begin, length in zip(run_start, run_len, strict=True):
                    walk += [(begin + i, tiles.block_n) for i in range(0, length - tiles.block_n + 1, tiles.block_n)]
                for begin, length in zip(run_start, run_len, strict=True):
                    whole = length // tiles.block_n * tiles.block_n
                    walk += [(begin + i, min(tiles.tail_n, length - i)) for i in range(whole, length, tiles.tail_n)]
                for first in range(start, start + size, tiles.block_m):
                    rows = orders[0][b, h, first : min(first + tiles.block_m, start + size)]
                    highest = torch.full((len(rows),), -torch.inf, dtype=torch.float64)
                    for key, count in walk:
                        keys = orders[1][b, h, key : key + count]
                        here = scores[b, h][rows][:, keys].amax(-1)
                        if (here - highest.maximum(here)).max() >= -bound:
                            highest = highest.maximum(here)
                            mask[b, h, rows.unsqueeze(-1), keys] = True
    return mask.to(q.device)


def check(q, k, v, plan, tiles, out, lse, tolerance=1e-5):
    read = left_out(q, k, plan, SCALE, BOUND, tiles)
    whole = plan.to_dense_mask().expand(read.shape)
    assert not (read & ~whole).any()
    share = (read & ~whole | ~read & whole).sum() / whole.sum()
    assert share > 0.02, "nothing is left out: the test shows nothing"
    expected, sums = masked_attention(q, k, v, read, SCALE)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), sums, atol=tolerance, rtol=tolerance)
    exact, _ = masked_attention(q, k, v, whole, SCALE)
    # The keys left out weigh less than exp(-BOUND) of the best each.
    most = 2 * v.abs().max() * (whole & ~read).sum(-1).max() * torch.tensor(-BOUND).exp()
    assert (out.double() - exact).abs().max() <= most


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_are_left_out_as_written_out(device, kind):
    plan, q, k, v = falling(device, kind)
    plan = replace(plan, pv_threshold=BOUND)
    out, lse = sparse_attention(q, k, v, plan, scale=SCALE, return_lse=True)
    check(q, k, v, plan, forward_tiles(q, plan), out, lse, 1e-5 if device.type == "cpu" else 1e-2)


def test_through_tensor_descriptors(device):
    plan, q, k, v = falling(device, "uniform", dtype=torch.float16 if device.type == "cuda" else torch.float32)
    out, lse = results(q)
    tiles = Tiles(16, 32, 4, 2, tail=16, described=True)
    launch_forward(q, k, v, out, lse, plan, None, None, SCALE * LOG2E, tiles, bound=BOUND * LOG2E)
    check(q, k, v, plan, tiles, out, lse, 1e-5 if device.type == "cpu" else 1e-2)


@pytest.mark.parametrize("kind", ["uniform", "ragged"])
def test_with_scores_in_int8(device, kind):
    """A tile whose highest score lies near the bound may be judged otherwise: only the error is compared."""
    plan, q, k, v = falling(device, kind)
    without = sparse_attention(q, k, v, plan, scale=SCALE, qk="int8")
    found = sparse_attention(q, k, v, replace(plan, pv_threshold=BOUND), scale=SCALE, qk="int8")
    if device.type == "cpu":
        keys = int8_tiles(q, plan.tile_len, plan.block[1] if plan.block else 0, False)[1]
        assert keys == (32 if kind == "uniform" else 0)
    assert 0 < (found - without).abs().max() < 0.05


def test_a_bound_that_nothing_reaches_changes_no_bit(device):
    plan, q, k, v = falling(device, "ragged")
    expected = sparse_attention(q, k, v, plan, backend="triton")
    assert sparse_attention(q, k, v, replace(plan, pv_threshold=1e9), backend="triton").equal(expected)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("keys", [70, 150])
@pytest.mark.parametrize("which", ["queries", "keys", "a tile of keys"])
def test_what_is_not_a_number_comes_out(device, which, keys, dim):
    """All tiles of it were left out, which made zeros, also in the rows of a piece that hold no query."""
    q, k, v = (torch.randn(1, 2, n, dim, device=device) for n in (70, keys, keys))
    if which == "queries":
        q[:] = torch.nan
    else:
        k[:, :, : 64 if which == "a tile of keys" else keys] = torch.nan
    plan = replace(BlockPlan.dense(70, keys, device), is_dense=False, pv_threshold=BOUND)
    out, lse = sparse_attention(q, k, v, plan, return_lse=True)
    assert out.isnan().all() and lse.isnan().all()


def test_tiles_below_all_numbers_weigh_nothing(device):
    """Scores of -inf, as an overflow in float16 makes them, also in the first tiles that a query reads."""
    q, v = torch.rand(1, 2, 70, 64, device=device) + 0.1, torch.randn(1, 2, 150, 64, device=device)
    k = torch.rand_like(v)
    k[:, :, :100] = -torch.inf
    plan = replace(BlockPlan.dense(70, 150, device), is_dense=False)
    expected, sums = sparse_attention(q, k, v, plan, backend="reference", return_lse=True)
    for bound in (None, BOUND):
        out, lse = sparse_attention(q, k, v, replace(plan, pv_threshold=bound), backend="triton", return_lse=True)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse, sums, atol=1e-5, rtol=1e-5)
    k[:] = -torch.inf
    out, lse = sparse_attention(q, k, v, plan, backend="triton", return_lse=True)
    assert not out.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize("backend", [name for name, b in BACKENDS.items() if not b.capability.second_stage])
def test_other_backends_decline_in_words(device, backend):
    plan, q, k, v = falling(device)
    plan = replace(plan, pv_threshold=BOUND)
    with pytest.raises(RuntimeError, match=f"'{backend}' does not compute with pv_threshold: use 'auto' or 'triton'"):
        sparse_attention(q, k, v, plan, backend=backend)


def test_no_gradient_is_asked_for_in_silence(device):
    plan, q, k, v = falling(device)
    plan = replace(plan, pv_threshold=BOUND)
    with pytest.raises(RuntimeError, match=r"has no backward with pv_threshold: call it under torch.no_grad"):
        sparse_attention(q.requires_grad_(), k, v, plan)


@pytest.mark.parametrize("bad", [0, -3.0, float("inf"), True])
def test_a_threshold_has_bounds(bad):
    with pytest.raises(ValueError, match="pv_threshold is .*above 0"):
        Sparge(pv_threshold=bad)


def test_the_meter_shows_what_sparge_leaves_out(device):
    _, q, k, v = falling(device)
    layout = VideoLayout(q.shape[2] // 10, 2, 5)
    errors = []
    for threshold in (None, 8.0, 1.0):
        method = Sparge(topk=1.0, block=(16, 16), pv_threshold=threshold)
        options = {"schedule": DenseSchedule(), "measure_error": 32, "backend": "triton"}
        engine = SparseAttention(method, num_layers=1, **options)
        engine.enter(StepInfo(), layout)
        engine(q, k, v, 0)
        (record,) = engine.report().measured()
        assert engine.report().config["pv_threshold"] == threshold
        errors.append(record.error)
    assert errors[0] < 1e-5 < errors[1] < 1e-2 < errors[2] < 0.5, errors


def test_what_a_machine_lacks_is_told_before_a_run(monkeypatch):
    pytest.importorskip("diffusers")
    from tiny_wan import make_pipe

    from vidaccel.generation.job import Sparse, prepare
    from vidaccel.generation.requests.settings import Settings

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    with pytest.raises(RuntimeError, match="with pv_threshold: backend 'triton' runs on cuda"):
        vidaccel.accelerate(make_pipe(), Sparge(pv_threshold=8))
    asked = Sparse(methods=("sparge",), overrides={"sparge": {"pv_threshold": 8}})
    with pytest.raises(
        BadInput, match=r"^method is sparge: its pv_threshold cannot be had here: .*Leave pv_threshold out"
    ):
        prepare("demo", Settings("a dot", frames=33), asked, device="cpu")


def test_plans_of_sparge_carry_it():
    q, k, v = torch.randn(3, 1, 2, 60, 16)
    for text in (0, 6):
        layout = VideoLayout(3, 6, 3, text_after=text)
        x = [t[:, :, : layout.tokens] for t in (q, k, v)]
        assert Sparge(block=(16, 16), pv_threshold=7).plan(*x, layout, PlanMemory()).pv_threshold == 7
        assert Sparge(block=(16, 16)).plan(*x, layout, PlanMemory()).pv_threshold is None


SCRIPT = """
from vidaccel.attention.kernels import block_sparse_forward as forward, block_sparse_int8 as int8, columns

architecture, dim, dtype = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
found = []


def compile_forward(table, quantised, stand_ins, bounded):
    tiles = table.get((architecture // 10, dim, 2)) or table[0, dim, 2]
    described = tiles.described and not quantised
    part = columns.part_width(architecture // 10, dim, tiles, 2, bounded)
    constants = {"D": dim, "D_PAD": dim, "PART": part, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
                 "TAIL_N": tiles.tail_n, "Q_ORDERED": False, "GATHER_KV": False, "DESCRIBED": described,
                 "STAND_INS": stand_ins, "K_BLOCKED": quantised}
    names = ["v_scale", "q_order", "kv_order"]
    names += [] if quantised else ["q_scale", "k_scale", "lse_shift"]
    names += [] if quantised and stand_ins else ["whole_q"]
    names += [] if stand_ins else ["skip_key", "skip_value", "skip_bias"]
    kinds = {"q": "i8", "k": "i8"} if quantised else {}
    for name, keys in (("k", tiles.block_n), ("v", tiles.block_n), ("k_tail", tiles.tail_n), ("v_tail", tiles.tail_n)):
        if described:
            kinds[name] = f"tensordesc<{dtype}[{keys}, {dim}]>"
        elif "tail" in name:
            names.append(name)
    constants |= {f"{name}_ptr": None for name in names} | ({} if bounded else {"bound": None})
    found.append(compile_kernel(forward._forward_kernel, architecture, dtype, constants, tiles, **kinds))
    found[-1]["keys"] = tiles.block_n


table = forward.FORWARD_TILES | forward.SECOND_STAGE_TILES
for stand_ins, bounded in ((False, False), (False, True), (True, True)):
    compile_forward(table, False, stand_ins, bounded)
compile_forward(int8.ALIGNED_TILES, True, True, True)
print(json.dumps(found))
"""


# Of one warp in the loop over whole tiles, for 64 keys and 16 queries: 644 to 696, and 924 to 958 with the columns of
# the second product dealt to several warps.
MOST_INSTRUCTIONS = {80: 760, 120: 760}


@pytest.mark.parametrize(
    ("architecture", "dim"),
    [
        (90, 128),
        pytest.param(90, 64, marks=pytest.mark.slow),
        pytest.param(80, 128, marks=pytest.mark.slow),
        pytest.param(100, 128, marks=pytest.mark.slow),
        pytest.param(120, 128, marks=pytest.mark.slow),
    ],
)
def test_the_compiled_loops_branch_around_their_second_product(tmp_path, architecture, dim):
    """And products wait for one another neither there nor where stand-ins are read behind these loops."""
    plain, *bounded = run_with_compiler(SCRIPT, tmp_path, architecture, dim, "bf16")
    for kernel in bounded:
        assert kernel["shared"] <= SHARED[architecture]
    if architecture == 100:  # where one thread asks for all products, behind a branch of its own
        return
    assert not any(loop["skipped"] for loop in plain["loops"])
    for kernel in bounded:
        assert not kernel["serialised"], "products wait for one another"
        walks, stand_ins = kernel["loops"][:2], kernel["loops"][2:]
        for loop in walks:
            assert not loop["spills"], "registers go to memory within a loop"
            assert loop["products"] > loop["skipped"] > 0, "no branch leads around the product with the values"
        assert not any(loop["skipped"] for loop in stand_ins)
        if architecture in MOST_INSTRUCTIONS and not kernel["int8"]:
            assert walks[0]["instructions"] * 64 / kernel["keys"] <= MOST_INSTRUCTIONS[architecture]
