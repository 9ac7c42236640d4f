"""Counts what one call would launch on a GPU: torch's operators that compute, and Triton kernels."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

_MAKES_MEMORY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Launches(TorchDispatchMode):
    """Counts by name, in `counts`, what runs inside of the context on the CPU with Triton's interpreter.

    Views and memory without values launch nothing. An operator of torch counts once, though a sort takes several
    launches: good enough for what it is for, which is to see a plan grow.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._inside = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not self._inside and name not in _MAKES_MEMORY and self._computes(func, (args, kwargs), out):
            self.counts[name] += 1
        return out

    @staticmethod
    def _computes(func, given, out) -> bool:
        if func.namespace != "aten":  # an operator of our own, whose kernels count
            return False
        if func._schema.is_mutable:
            return True
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        held = {x.untyped_storage()._cdata for x in tree_leaves(given) if isinstance(x, torch.Tensor)}
        return any(x.untyped_storage()._cdata not in held for x in made)

    def __enter__(self):
        self._call = GridExecutor.__call__

        def launch(executor, *args, **kwargs):
            self.counts["triton " + executor.fn.__name__] += 1
            self._inside = True  # what the interpreter does with torch is no launch
            try:
                return self._call(executor, *args, **kwargs)
            finally:
                self._inside = False

        GridExecutor.__call__ = launch
        return super().__enter__()

    def __exit__(self, *error):
        GridExecutor.__call__ = self._call
        return super().__exit__(*error)
