"""A GPU that is not there: programs run as they would on one, without values, and what would fail there fails here.

Tensors on "cuda" have shapes, dtypes and devices, and no values (`tensors`); kernels of Triton are bound to their
arguments as at a launch, and compiled where that is asked for, and not run (`launches`). So tensors on two devices,
waits of the host, arguments that a kernel does not take and grids that no GPU has show without a GPU. What kernels
compute, and how fast, does not.

In a process of its own (`apart`): triton must not be imported as its interpreter, and what is put in torch's place to
make it believe in a GPU stays there.
"""

from __future__ import annotations

import contextlib
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .guard import stand_in_for_cuda
from .launches import Launches
from .tensors import Tensors

PROCESSORS = {(8, 0): 108, (8, 9): 128, (9, 0): 132, (10, 0): 148, (12, 0): 170}
MEMORY = 80 * 2**30


@dataclass
class PretendedGPU:
    """What was seen."""

    launches: Launches
    tensors: Tensors

    def forget(self) -> None:
        self.launches.forget()
        self.tensors.waits.clear()

    def seen(self) -> dict[str, Any]:
        """Launches by kernel, what no GPU would take, and where the host waited, each once."""
        return {
            "launches": dict(self.launches.counts),
            "problems": sorted(set(self.launches.problems)),
            "waits": list(dict.fromkeys(self.tensors.waits)),
        }


@contextlib.contextmanager
def pretended_gpu(capability: tuple[int, int] = (9, 0), compile: bool = False) -> Iterator[PretendedGPU]:
    """Within it there is one GPU.

    Args:
        capability: compute capability, one of `PROCESSORS`.
        compile: kernels to machine code, each variant once.
    """
    stand_in_for_cuda()
    properties = types.SimpleNamespace(
        major=capability[0],
        minor=capability[1],
        name="a pretended GPU",
        multi_processor_count=PROCESSORS[capability],
        total_memory=MEMORY,
        warp_size=32,
        gcnArchName="",
    )
    tensors = Tensors()
    launches = Launches(capability, compile, tensors.written)
    cuda = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "device": lambda device: contextlib.nullcontext(),
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: properties.name,
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "synchronize": lambda device=None: tensors.wait("torch.cuda.synchronize"),
        "memory_stats": lambda device=None: defaultdict(int),
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "current_stream": lambda device=None: _Stream(),
        "is_current_stream_capturing": lambda: False,
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": _Stream,
        "Event": _Event,
    }
    accelerator = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_accelerator": lambda *args, **kwargs: torch.device("cuda"),
        "synchronize": cuda["synchronize"],
    }
    with contextlib.ExitStack() as stack:
        for module, functions in (("cuda", cuda), ("accelerator", accelerator)):
            for name, value in functions.items():
                stack.enter_context(mock.patch(f"torch.{module}.{name}", value))
        # Memory comes aligned, as from torch's allocator.
        address = lambda x: x.storage_offset() * x.element_size()  # noqa: E731
        stack.enter_context(mock.patch.object(FakeTensor, "data_ptr", address))
        stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", _moved))
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(launches)
        tensors.operators.update(_own_operators())
        stack.enter_context(tensors)
        yield PretendedGPU(launches, tensors)


def _own_operators() -> dict[Any, Any]:
    """Our operators, which torch would otherwise not look into, and what they run."""
    from vidaccel.attention.kernels import block_sparse, block_sparse_backward, block_sparse_int8

    modules = (block_sparse, block_sparse_backward, block_sparse_int8)
    found = [value for module in modules for value in vars(module).values() if hasattr(value, "_opoverload")]
    return {operator._opoverload: operator._init_fn for operator in found}


def _moved(module: torch.nn.Module, move: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """`Module._apply` with new parameters, since a tensor with values cannot become one without, nor the reverse."""
    for child in module.children() if recurse else ():
        _moved(child, move)
    with torch.no_grad():
        for name, weight in module._parameters.items():
            if weight is not None and (new := move(weight)) is not weight:
                module._parameters[name] = torch.nn.Parameter(new, weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = move(buffer)
    return module


class _Stream:
    """All streams are one."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> _Event:
        return event or _Event()

    def synchronize(self) -> None: ...


class _Event:
    """All work is done at once, and takes a millisecond."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 1.0
