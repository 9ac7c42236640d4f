"""The k-means kernels compile to machine code for GPUs that are not there; see `test_compiles_for_gpus.py`."""

from __future__ import annotations

import pytest
from gpu_compiler import SHARED, run_with_compiler

pytest.importorskip("triton")

SCRIPT = """
from vidaccel.attention.kernels import kmeans, launch

architecture, dim, dtype = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
width = {"D": dim, "D_PAD": launch.padded(dim)}
tiles = launch.Tiles(0, 0, 4, 3)
blocks = {"BLOCK_N": kmeans.TOKENS, "BLOCK_C": kmeans.CENTROIDS, "PRECISION": "ieee" if dtype == "fp32" else "tf32"}
print(json.dumps([
    compile_kernel(kmeans._assign_kernel, architecture, dtype, {**width, **blocks}, tiles, center="fp32",
                   half_norm="fp32", label="i64"),
    compile_kernel(kmeans._sum_kernel, architecture, dtype, {**width, "BLOCK": kmeans.ADDED}, tiles, sum="fp32"),
    compile_kernel(kmeans._mean_kernel, architecture, dtype, width, tiles._replace(num_warps=1), sum="fp32",
                   center="fp32", out="fp32"),
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
    ],
)
def test_kmeans_kernels_compile(tmp_path, architecture, dim, dtype):
    assign, added, mean = run_with_compiler(SCRIPT, tmp_path, architecture, dim, dtype)
    for result in (assign, added, mean):
        assert result["shared"] <= SHARED[architecture], result
    if dtype != "fp32":
        assert assign["tensor_cores"] > 0, assign
