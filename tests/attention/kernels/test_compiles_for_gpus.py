"""Every kernel compiles to machine code for the GPUs in the tables, without one of them being there.

The interpreter takes much that the compiler refuses, so this runs Triton's compiler down to the binary, for a head
dimension and dtype per architecture, with and without orders. What it cannot show is that the binary computes the right
thing, or how fast.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = """
import json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vidaccel.attention.kernels import block_sparse as forward, block_sparse_backward as backward

POINTERS = {"i64": "q_order kv_order bits", "fp32": "lse delta grad_lse", "dtype": "q k v out grad dq dk dv"}


def compile_kernel(kernel, architecture, dtype, constants, tiles):
    types = {f"{name}_ptr": kind for kind, names in POINTERS.items() for name in names.split()}
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + types.get(name, "i32").replace("dtype", dtype)
        else:
            signature[name] = "fp32" if name.endswith("scale") else "i32"
        if name not in constants and re.search("(_ptr|_s[bhn])$", name):
            aligned[(i,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, aligned)
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    assert len(binary.asm["cubin"]) > 1000
    text = binary.asm["ttgir"]
    return {"kernel": kernel.__name__, "shared": binary.metadata.shared, "copies": text.count("async_copy_global"),
            "tensor_cores": text.count("mma")}


architecture, dim, dtype, ordered = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "True"
size = {"bf16": 2, "fp16": 2, "fp32": 4}[dtype]
found = []
for kernel, table in ((forward._forward_kernel, forward.FORWARD_TILES), (backward._query_kernel, backward.QUERY_TILES),
                      (backward._key_kernel, backward.KEY_TILES)):
    width = max(64, forward.padded(dim))
    tiles = table.get((architecture // 10, width, size)) or table[0, width, size]
    constants = {"D": dim, "D_PAD": forward.padded(dim), "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
                 "Q_ORDERED": ordered, "GATHER_KV": ordered}
    if kernel is backward._key_kernel:
        constants["KV_ORDERED"] = ordered
    unused = {name: None for name in ("q_order_ptr", "kv_order_ptr") if not ordered}
    found.append(compile_kernel(kernel, architecture, dtype, {**constants, **unused}, tiles))
small = forward.Tiles(64, 64, 4, 1)
found.append(compile_kernel(backward._delta_kernel, architecture, dtype, {"D": dim, "D_PAD": forward.padded(dim),
                            "BLOCK_M": 64}, small))
found.append(compile_kernel(backward._key_bits_kernel, architecture, dtype, {"BLOCK_N": 64, "CHUNK": 64}, small))
print(json.dumps(found))
"""
# Shared memory a program may have, in bytes (CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability").
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


@pytest.mark.parametrize(
    ("architecture", "dim", "dtype", "ordered"),
    [
        (90, 128, "bf16", False),
        (90, 64, "fp16", True),
        (89, 96, "bf16", True),
        pytest.param(80, 128, "bf16", True, marks=pytest.mark.slow),
        pytest.param(90, 256, "bf16", False, marks=pytest.mark.slow),
        pytest.param(90, 128, "fp32", False, marks=pytest.mark.slow),
        pytest.param(100, 128, "bf16", True, marks=pytest.mark.slow),
        pytest.param(120, 256, "bf16", False, marks=pytest.mark.slow),
    ],
)
def test_kernels_compile(tmp_path, architecture, dim, dtype, ordered):
    import vidaccel

    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    # By path: a checkout need not be installed, nor its folder be called vidaccel.
    root = Path(vidaccel.__file__).parent
    start = f"import importlib.util as u; s = u.spec_from_file_location('vidaccel', {str(root / '__init__.py')!r}, "
    start += f"submodule_search_locations=[{str(root)!r}]); import sys; m = u.module_from_spec(s); "
    start += "sys.modules['vidaccel'] = m; s.loader.exec_module(m)\n"
    command = [sys.executable, "-c", start + SCRIPT, str(architecture), str(dim), dtype, str(ordered)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    results = {result["kernel"]: result for result in json.loads(done.stdout.splitlines()[-1])}
    assert len(results) == 5
    for result in results.values():
        assert result["shared"] <= SHARED[architecture], result
    if dtype != "fp32":
        for name in ("_forward_kernel", "_query_kernel", "_key_kernel"):
            assert results[name]["tensor_cores"] > 0, results[name]
    if architecture >= 90 and dtype != "fp32":
        assert results["_forward_kernel"]["copies"] > 0, "the loads of the forward kernel are not pipelined"
