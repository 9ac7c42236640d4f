"""Has a build of torch without CUDA believe that a device called "cuda" can be chosen."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
using NoOp = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
C10_REGISTER_GUARD_IMPL(CUDA, NoOp)
"""


def missing() -> str | None:
    """Why it cannot be done here; None where it can."""
    if torch.backends.cuda.is_built():
        there = hasattr(torch._C, "_ensureCUDADeviceGuardSet")
        return None if there else f"torch {torch.__version__} with CUDA cannot be made to believe in a GPU"
    if shutil.which("g++"):
        return None
    return "torch without CUDA needs a C++ compiler (g++) to believe in a GPU"


@functools.cache
def stand_in_for_cuda() -> None:
    """For as long as the process lasts. A build with CUDA has what it takes."""
    if torch.backends.cuda.is_built():
        torch._C._ensureCUDADeviceGuardSet()
        return
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(SOURCE)
        paths = [f"-I{root / 'include'}", str(source), "-o", str(library), f"-L{root / 'lib'}", "-lc10"]
        subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", *paths], check=True)
        ctypes.CDLL(str(library))
