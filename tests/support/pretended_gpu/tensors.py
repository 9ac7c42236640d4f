"""Tensors on a GPU that is not there."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import vidaccel

OURS = str(Path(vidaccel.__file__).parent)  # a checkout need not be called vidaccel
TESTS = str(Path(__file__).parents[2])
KNOWN = 2**16  # elements
ATEN = torch.ops.aten
# Of these, `item` and `is_nonzero` come in inference mode.
READS = (ATEN._local_scalar_dense.default, ATEN.item.default, ATEN.is_nonzero.default, ATEN.equal.default)
COPY = ATEN.copy_.default


class Tensors(TorchDispatchMode):
    """What is on "cuda" has no values; all else is real.

    Small tensors that were made of real ones alone carry their values along, so that a program may read a timestep or a
    mask. Of others it reads what is usual: that something holds, or 1; their copies on the host are zeros.

    Attributes:
        waits: where the host read something of the GPU, or copied it from there: what, and the nearest functions of
            vidaccel and diffusers.
        operators: what runs in the place of operators that are one piece for torch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.operators: dict[Any, Callable[..., Any]] = {}
        self._fake = FakeTensorMode(allow_non_fake_inputs=False)

    def wait(self, what: str) -> None:
        named = [f for f in traceback.extract_stack() if _is_told(f.filename) and not f.name.startswith("<")]
        places = [f"{f.filename.rsplit('/', 1)[-1]} {f.name}" for f in named[-2:]]
        self.waits.append(f"{what} in {' > '.join(places)}")

    def written(self, tensors: Iterable[torch.Tensor]) -> None:
        """A kernel may have written to them, and their values are no longer known."""
        for x in tensors:
            x._known = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in self.operators:
            with self:
                return self.operators[func](*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        if not any(isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == "cuda") for x in leaves):
            return func(*args, **kwargs)
        given = [x for x in leaves if isinstance(x, torch.Tensor)]
        values = self._values(func, given, args, kwargs)
        if func in READS:
            self.wait("a number is read")
            return _usual(func, given[0]) if values is None else values
        if func is COPY and not isinstance(given[0], FakeTensor):  # from there to a real one
            if not given[0].is_meta and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
                self.wait("a copy")
            return given[0]
        out = self._without_values(func, args, kwargs, given, values)
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        known = (
            [None] * len(made) if values is None else [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
        )
        for x, value in zip(made, known, strict=True):
            x._known = value if value is not None and value.numel() <= KNOWN else None
        if all(x.is_cuda for x in made):
            return out
        # To meta nothing goes.
        if not kwargs.get("non_blocking") and not all(x.is_cuda or x.is_meta for x in made):
            self.wait("a copy")
        return tree_map(lambda x: _on_the_host(x) if isinstance(x, FakeTensor) and not x.is_cuda else x, out)

    def _values(self, func: Any, given: list[torch.Tensor], args: tuple, kwargs: dict) -> Any:
        """What the operator makes of values that are known; None where some are not, or chance makes them."""
        if torch.Tag.nondeterministic_seeded in func.tags or "empty" in func.name():
            return None
        if any(_value(x) is None for x in given):
            return None

        def real(x: Any) -> Any:
            if isinstance(x, torch.Tensor):
                return _value(x)
            return torch.device("cpu") if isinstance(x, torch.device) else x

        args, kwargs = tree_map(real, (args, kwargs))
        return func(*args, **kwargs)

    def _without_values(self, func: Any, args: tuple, kwargs: dict, given: list[torch.Tensor], values: Any) -> Any:
        args, kwargs = tree_map(lambda x: self._on_no_device(x) if isinstance(x, torch.Tensor) else x, (args, kwargs))
        try:
            with self._fake:
                return func(*args, **kwargs)
        except DynamicOutputShapeException:  # as many as there are values, for which the host waits
            if values is None:
                raise
            self.wait(func.name())
            device = next(x.device for x in given if isinstance(x, FakeTensor))
            return tree_map(lambda x: self._moved(x, device) if isinstance(x, torch.Tensor) else x, values)

    def _on_no_device(self, x: torch.Tensor) -> torch.Tensor:
        # Detached: what is converted itself is remembered by torch, and could then not be exchanged.
        return x if isinstance(x, FakeTensor) else self._fake.from_tensor(x.detach())

    def _moved(self, x: torch.Tensor, device: torch.device) -> torch.Tensor:
        x = self._on_no_device(x)
        with self._fake:
            return x.to(device)


def _is_told(file: str) -> bool:
    """Whether a file is one of vidaccel, but no test, or of diffusers."""
    if "/diffusers/" in file:
        return True
    # A checkout has its environment, with all other packages, in a folder of its own.
    return file.startswith(OURS) and not file.startswith(TESTS) and "site-packages" not in file.removeprefix(OURS)


def _value(x: torch.Tensor) -> torch.Tensor | None:
    if isinstance(x, FakeTensor):
        return getattr(x, "_known", None)
    return x if x.numel() <= KNOWN else None


def _on_the_host(x: FakeTensor) -> torch.Tensor:
    value = _value(x)
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).zero_() if value is None else value.clone()


def _usual(func: Any, x: torch.Tensor) -> bool | float | int:
    if x.dtype == torch.bool or func in (ATEN.is_nonzero.default, ATEN.equal.default):
        return True
    return 1.0 if x.is_floating_point() else 1
