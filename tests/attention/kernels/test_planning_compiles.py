"""The kernels that plan compile to machine code for GPUs that are not there; see `test_compiles_for_gpus.py`."""

from __future__ import annotations

import pytest
from gpu_compiler import SHARED, run_with_compiler

pytest.importorskip("triton")

SCRIPT = """
from functools import partial

from vidaccel.attention.kernels import kmeans, launch, permute, probe, profile, runs, sample, slopes, spend, walk
from vidaccel.attention.methods import svg
from vidaccel.attention.clustering.spread import SAMPLE
from vidaccel.attention.clustering.slopes import rows_at_once

architecture, dim, dtype = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
compile_kernel = partial(compile_kernel, disassembled=False)
width = {"D": dim, "D_PAD": launch.padded(dim)}
narrow, wide = (kmeans.SINGLE, kmeans.SINGLE_WIDE) if dtype == "fp32" else (kmeans.HALF, kmeans.HALF_WIDE)
tiles = narrow if dim <= 128 else wide
probing = probe.TILES[dtype != "fp32", max(64, launch.padded(dim))]
small = launch.Tiles(0, 0, 4, 1)
itemsize = 4 if dtype == "fp32" else 2
columns, moved = slopes.columns_of(dim, itemsize), rows_at_once(dim, itemsize)
rows = svg.KERNEL_ROWS[4 if dtype == "fp32" else 2]
blocks = {"BLOCK_N": tiles.block_m, "BLOCK_C": tiles.block_n, "HALF": dtype != "fp32"}
print(json.dumps([
    compile_kernel(kmeans._assign_kernel, architecture, dtype, {**width, **blocks}, tiles, center=dtype,
                   offset="fp32", label="i16"),
    compile_kernel(kmeans._center_kernel, architecture, dtype, {**width, "HALF": dtype != "fp32"},
                   small._replace(num_warps=1), center="fp32", rounded=dtype, offset="fp32"),
    compile_kernel(kmeans._sum_kernel, architecture, dtype, {**width, "BLOCK": kmeans.ADDED},
                   tiles._replace(num_warps=4), sum="fp32"),
    compile_kernel(kmeans._mean_kernel, architecture, dtype, {**width, "MOST": kmeans.PIECE},
                   tiles._replace(num_warps=1), sum="fp32", center="fp32", out="fp32", size="i64"),
    compile_kernel(kmeans._sizes_kernel, architecture, dtype, {"BLOCK": kmeans.COUNTED}, small._replace(num_warps=1),
                   ordered="i16", size="i64"),
    compile_kernel(runs._pieces_kernel, architecture, dtype, {"GIVEN": True, "BLOCK": runs.BLOCK}, small, length="i64"),
    compile_kernel(probe._probe_kernel, architecture, dtype, {**width, "BLOCK_M": probing.block_m,
                   "BLOCK_N": probing.block_n}, probing),
    compile_kernel(probe._read_kernel, architecture, dtype, {**width, "WIDTH": 512, "BLOCK": 32}, small,
                   log_mass="fp32", out="fp32", away="fp32"),
    compile_kernel(profile._rows_kernel, architecture, dtype, {**width, "ROWS": 32, "SPLIT": profile.SPLIT,
                   "KEYS": profile.KEYS if dtype != "fp32" else 16}, launch.Tiles(0, 0, 8, 2), out="fp32"),
    compile_kernel(profile._rows_kernel, architecture, dtype, {**width, "ROWS": rows, "SPLIT": profile.SPLIT,
                   "KEYS": profile.KEYS if dtype != "fp32" else 16},
                   launch.Tiles(0, 0, 8, profile.stages_of(rows, width["D_PAD"])), out="fp32"),
    compile_kernel(permute._permute_kernel, architecture, dtype, {**width, "ROWS": permute.ROWS}, small),
    compile_kernel(runs._merge_kernel, architecture, dtype, {"BLOCK": runs.BLOCK}, small, order="i32"),
    compile_kernel(runs._filled_kernel, architecture, dtype, {"BLOCK": runs.BLOCK}, small, size="i64", order="i32"),
    compile_kernel(runs._starts_kernel, architecture, dtype, {"BLOCK": runs.BLOCK}, small, size="i64"),
    compile_kernel(permute._text_last_kernel, architecture, dtype, {"BLOCK": permute.ENTRIES}, small, out="i64"),
    compile_kernel(sample._deviations_kernel, architecture, dtype, {**width, "SAMPLE": SAMPLE, "BLOCK": sample.BLOCK,
                   "MEANS": True}, small, size="i64", mean="fp32"),
    compile_kernel(sample._deviations_kernel, architecture, dtype, {**width, "SAMPLE": SAMPLE, "BLOCK": sample.BLOCK,
                   "MEANS": False, "mean_ptr": None}, small, size="i64"),
    compile_kernel(spend._rank_kernel, architecture, dtype, {"BLOCK": 512}, small, score_spread="fp32",
                   value_spread="fp32", away="fp32", q_size="i64", k_size="i64", error="fp32", rank="fp32", cost="i64"),
    compile_kernel(spend._take_kernel, architecture, dtype, {"BLOCK": spend.BLOCK}, small, flat="fp32", price="i64",
                   total="i64", budget="fp32", taken="i8"),
    compile_kernel(slopes._slopes_kernel, architecture, dtype, {**width, "ROWS": moved, "COLUMNS": columns},
                   small._replace(num_stages=slopes.STAGES), slope=dtype, centre="fp32", out=dtype, result=dtype,
                   piece_start="i32", piece_len="i32", piece_tile="i32"),
    compile_kernel(walk._work_kernel, architecture, dtype, {"BLOCK": walk.PIECES}, small),
    compile_kernel(walk._reorder_kernel, architecture, dtype, {"BLOCK": walk.PIECES}, small),
    compile_kernel(runs._cut_kernel, architecture, dtype, {"BLOCK_N": 128, "TAIL_N": 64, "BLOCK": runs.BLOCK}, small),
]))
"""


@pytest.mark.parametrize(
    ("architecture", "dim", "dtype"),
    [
        (90, 128, "bf16"),
        pytest.param(80, 128, "fp16", marks=pytest.mark.slow),
        pytest.param(89, 96, "bf16", marks=pytest.mark.slow),
        pytest.param(90, 64, "fp32", marks=pytest.mark.slow),
        pytest.param(120, 128, "bf16", marks=pytest.mark.slow),
        pytest.param(89, 256, "bf16", marks=pytest.mark.slow),
        pytest.param(120, 128, "fp32", marks=pytest.mark.slow),
        pytest.param(120, 256, "fp32", marks=pytest.mark.slow),
    ],
)
def test_planning_kernels_compile(tmp_path, architecture, dim, dtype):
    found = run_with_compiler(SCRIPT, tmp_path, architecture, dim, dtype)
    for result in found:
        assert result["shared"] <= SHARED[architecture], result
        if dtype != "fp32" and result["kernel"] in (
            "_assign_kernel",
            "_probe_kernel",
            "_rows_kernel",
            "_slopes_kernel",
        ):
            assert result["tensor_cores"] > 0, result
