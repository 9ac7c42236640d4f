"""ComfyUI's native models, sampled as on a GPU, where there need not be one; see `pretended_gpu`."""

from __future__ import annotations

import native_comfyui  # skips this file where there is no ComfyUI
import pytest
from fast_set import slow
from fastwan_models import write_fastwan
from gpu_compiler import run_with_compiler
from pretended_gpu.guard import missing

from vidaccel.pipelines.few_steps import convert_fastwan

SCRIPT = """
from pretended_gpu import native
print(json.dumps(native.run([name for name in native.names() if (name in sys.argv[2:]) == (sys.argv[1] == "these")])))
"""
VSA = "from pretended_gpu import native; print(json.dumps(native.run_vsa(*sys.argv[1:])))"
FEW = ("wan_t2v", "hunyuan", "ltxv")
# The level of each pass, the table of levels, q and k for NaN; some models say in tensors where a share of their
# steps lies, and some where their video is.
# `_run_pass` stands for ComfyUI's own.
KNOWN = (
    "override.py _run_pass",
    "override.py _enter",
    "override.py _levels_of",
    "call_checks.py finite",
    "sampling.py",
    "announced.py outer",
)
assert native_comfyui


pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.mark.parametrize("which", ["these", slow("others")])
def test_all_is_on_the_gpu_and_the_host_waits_for_little(which, tmp_path):
    results = run_with_compiler(SCRIPT, tmp_path, which, *FEW)
    assert len(results) == len(FEW) if which == "these" else len(results) > 15
    for result in results:
        assert result["launches"] and not result["problems"], result
        assert result["loaded"] == "cuda:0"
        assert all(any(known in wait for known in KNOWN) for wait in result["waits"]), result


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
def test_gates_follow_the_model_to_the_gpu(dtype, tmp_path):
    file = convert_fastwan(write_fastwan(tmp_path / "published"), tmp_path / "fastwan.safetensors")
    seen = run_with_compiler(VSA, tmp_path, file, dtype)
    assert seen["launches"] and not seen["problems"], seen
