"""Kernels of Triton, bound to their arguments as at a launch, and not run."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from gpu_compiler import SHARED

MOST_PROGRAMS = (2**31 - 1, 2**16 - 1, 2**16 - 1)


class Launches(contextlib.AbstractContextManager):
    """Stands where Triton launches.

    Args:
        capability: of the GPU to compile for.
        compile: each variant to machine code; else none is, and arguments are bound alone.
        written: is told the tensors that a kernel was given.

    Attributes:
        counts: by kernel.
        variants: by kernel, how many would have to be compiled: types, divisibility by 16 and constants of arguments.
        problems: what no GPU would take.
    """

    def __init__(
        self, capability: tuple[int, int], compile: bool, written: Callable[[Iterable[torch.Tensor]], None]
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.variants: defaultdict[str, int] = defaultdict(int)
        self.problems: list[str] = []
        self._compile, self._written = compile, written
        self._architecture = 10 * capability[0] + capability[1]

    def forget(self) -> None:
        self.counts.clear()
        self.problems.clear()

    def __enter__(self) -> Launches:
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction

        driver.set_active(_Driver(self._architecture))
        self._run, self._make = JITFunction.run, JITFunction._do_compile
        seen = self

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            seen._launch(kernel, args, options, grid)

        def make(kernel: Any, key: Any, signature: Any, device: Any, *rest: Any) -> Any:
            return seen._new_variant(kernel, key, signature, device, *rest)

        self._patches = contextlib.ExitStack()
        self._patches.enter_context(mock.patch.object(JITFunction, "run", run))
        self._patches.enter_context(mock.patch.object(JITFunction, "_do_compile", make))
        return self

    def __exit__(self, *exception: object) -> None:
        self._patches.close()

    def _launch(self, kernel: Any, args: tuple, options: dict[str, Any], grid: tuple[int, ...]) -> None:
        name = kernel.__name__
        self.counts[name] += 1
        given = list(_tensors((args, tuple(options.values()))))
        self.problems += [f"{name}: a tensor on {x.device}" for x in given if not x.is_cuda]
        if not all(0 < size <= most for size, most in zip(grid, MOST_PROGRAMS, strict=False)):
            self.problems.append(f"{name}: a grid of {grid}")
        self._run(kernel, *args, grid=grid, warmup=True, **options)
        self._written(given)

    def _new_variant(self, kernel: Any, key: Any, signature: Any, device: Any, *rest: Any) -> Any:
        self.variants[kernel.__name__] += 1
        if not self._compile:
            made = kernel.device_caches[device][0][key] = object()
            return made
        made = self._make(kernel, key, signature, device, *rest)
        if made.metadata.shared > SHARED[self._architecture]:
            self.problems.append(f"{kernel.__name__}: {made.metadata.shared} bytes of shared memory")
        return made


class _Driver:
    """What Triton asks of the driver of a GPU before it launches."""

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _tensors(x: Any) -> Iterator[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, tuple | list):
        for part in x:
            yield from _tensors(part)
    elif hasattr(x, "base"):  # of a tensor descriptor
        yield from _tensors(x.base)
