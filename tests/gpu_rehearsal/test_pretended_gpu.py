"""What would fail on a GPU, or hold it up, fails on the pretended one, or is told."""

from __future__ import annotations

from gpu_compiler import run_with_compiler

SCRIPT = """
import torch
from pretended_gpu import pretended_gpu
from pretended_gpu.kernels import doubled, greedy


def raised(run):
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


seen = {}
with pretended_gpu((8, 9), compile=True) as gpu:
    x, here = torch.randn(64, device="cuda"), torch.randn(64)
    seen["two devices"] = raised(lambda: x + here)
    seen["a number beside"] = raised(lambda: x + 2 * torch.tensor(1.0))
    doubled[(1,)](x, torch.empty_like(x), 64, BLOCK=64)
    seen["well"] = gpu.seen()
    doubled[(1,)](x, here, 64, BLOCK=64)
    doubled[(0,)](x, torch.empty_like(x), 64, BLOCK=64)
    doubled[(1, 70000)](x, torch.empty_like(x), 64, BLOCK=64)
    seen["badly"] = gpu.seen()
    seen["variants"] = gpu.launches.variants["doubled"]
    doubled[(1,)](x, torch.empty_like(x), 63, BLOCK=64)
    seen["one more"] = gpu.launches.variants["doubled"]
    seen["an argument too many"] = raised(lambda: doubled[(1,)](x, x, 64, BLOCK=64, OTHER=1))
    gpu.forget()
    wide = torch.empty(32, 1024, device="cuda", dtype=torch.float16)
    greedy[(1,)](wide, torch.empty(32, 32, device="cuda"), N=32, K=1024)
    seen["greedy"] = gpu.seen()
    gpu.forget()
    table = torch.arange(8.0).to("cuda")
    seen["known"] = [float(table[3] * 2), table.nonzero().shape[0], gpu.seen()["waits"]]
    gpu.forget()
    doubled[(1,)](table, table, 8, BLOCK=8)
    seen["written"] = float(table[3])
    gpu.forget()
    x.cpu(), here.copy_(x), x.to("cpu", non_blocking=True)
    seen["copies"] = len(gpu.tensors.waits)
seen["after"] = [torch.cuda.is_available(), raised(lambda: torch.ones(2).cpu() + 1)]
print(json.dumps(seen))
"""


def test_what_it_shows(tmp_path):
    seen = run_with_compiler(SCRIPT, tmp_path)
    assert "on the same device" in seen["two devices"] and seen["a number beside"] is None
    assert seen["well"] == {"launches": {"doubled": 1}, "problems": [], "waits": []}
    assert seen["badly"]["problems"] == [
        "doubled: a grid of (0,)",
        "doubled: a grid of (1, 70000)",
        "doubled: a tensor on cpu",
    ]
    assert seen["one more"] == seen["variants"] + 1  # 63 is not divisible by 16
    assert "OTHER" in seen["an argument too many"]
    assert seen["greedy"]["problems"] == ["greedy: 131072 bytes of shared memory"]
    assert seen["known"][:2] == [6.0, 7] and len(seen["known"][2]) == 2
    assert seen["written"] == 1.0  # what is usual, since it is no longer known
    assert seen["copies"] == 2
    assert seen["after"] == [False, None]
