"""What a device is called, in reports and where something is kept that was measured on it."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def device_name(device: torch.device) -> str:
    """What computes: the GPU with its memory, or the CPU with the threads that torch uses."""
    if device.type == "cpu":
        return cpu_words()
    return gpu_words(device) if device.type == "cuda" else f"{_cpu_name()}, {device.type}"


def cpu_words(cores: str = "") -> str:
    """The CPU and the threads that torch uses, with what is told of its cores in between."""
    import torch

    threads = torch.get_num_threads()
    return f"{_cpu_name()}{cores}, torch uses {threads} thread{'s' if threads != 1 else ''}"


def gpu_words(device: torch.device) -> str:
    """A CUDA device with its memory."""
    import torch

    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
