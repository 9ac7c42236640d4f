"""Compiles kernels to machine code for GPUs that are not there, in a process of its own.

This process may have imported triton as its interpreter, and cannot go back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import vidaccel

# Shared memory a program may have, in bytes (CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability").
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# For the scripts: `dtype` is what pointers to data point to, `others` what single ones do instead.
COMMON = r"""
import json, re, sys
import machine_code
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vidaccel.attention.kernels.launch import FUSED

POINTERS = {"i64": "order q_order kv_order bits", "i8": "int8 mask selected", "fp8e4nv": "fp8",
            "dtype": "x q whole_q k v out grad dq dk dv key value skip_key skip_value",
            "fp32": "lse delta grad_lse q_scale k_scale v_scale scale mean shift lse_shift inverse skip_bias bias "
                    "mass top total"}


def compile_kernel(kernel, architecture, dtype, constants, tiles, *, disassembled=True, **others):
    types = {f"{name}_ptr": kind for kind, names in POINTERS.items() for name in names.split()}
    types |= {f"{name}_ptr": kind for name, kind in others.items()}
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            kind = types.get(name, "i32").replace("dtype", dtype)
            signature[name] = kind if kind.startswith("tensordesc") else "*" + kind
        else:
            signature[name] = "fp32" if name.endswith(("scale", "factor", "bound")) else "i32"
        pointer = name.endswith("_ptr") and signature[name].startswith("*")
        if name not in constants and (pointer or re.search("_s[bhnt]$", name)):
            aligned[(i,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, aligned)
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, **FUSED}
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    assert len(binary.asm["cubin"]) > 1000
    text, products = binary.asm["ttgir"], re.findall(r"mma[.\w:]*", binary.asm["ptx"])
    return {"kernel": kernel.__name__, "shared": binary.metadata.shared, "copies": text.count("async_copy_global"),
            "tma": text.count("async_tma_copy_global_to_local"),
            **(machine_code.read(binary, architecture) if disassembled else {}), "tensor_cores": text.count("mma"),
            "int8": sum(bool(re.search("s8|i8", x)) for x in products),
            "fp8": sum(bool(re.search("e4m3|f8f6f4", x)) for x in products)}
"""


def run_with_compiler(script: str, folder: Path, *arguments: object) -> list[dict]:
    """Run a script that may call `compile_kernel`, with the arguments as its `sys.argv[1:]`.

    Returns:
        What the script prints last, as JSON.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    # By path: a checkout need not be installed, nor its folder be called vidaccel.
    root = Path(vidaccel.__file__).parent
    start = f"import importlib.util as u; s = u.spec_from_file_location('vidaccel', {str(root / '__init__.py')!r}, "
    start += f"submodule_search_locations=[{str(root)!r}]); import sys; m = u.module_from_spec(s); "
    start += "sys.modules['vidaccel'] = m; s.loader.exec_module(m)\n"
    start += f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    command = [sys.executable, "-c", start + COMMON + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
