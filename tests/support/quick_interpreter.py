"""Triton's interpreter without what it does over and over: it makes the same of every kernel in half the time.

- At each launch it exchanges the functions of `triton.language` for its own, and looks for them again at each call of
  one `triton.jit` function by another, where none is left.
- Each operation on integers is made once more in 64 bits, to see whether it overflows, and nobody reads the answer
  unless the interpreter's `debug` is on.
- Each value has a type and a shape of its own, with names in words; there are only a few different ones.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def make_quick() -> None:
    """Exchange these parts, where this version of Triton has them."""
    if hasattr(interpreter, "_LangPatchScope"):
        _exchange_once_a_launch()
        _remember_members()
    if hasattr(TritonSemantic, "binary_op_sanitize_overflow_impl"):
        _ask_for_overflow_in_debug_alone()
    if hasattr(interpreter, "_get_np_dtype"):
        _remember_dtypes()
    if isinstance(tl.block_type(tl.int32, [4]).shape, tl.tuple):
        _share_shapes()


def _exchange_once_a_launch() -> None:
    """Let the calls within a launch find the language as its first call left it."""
    exchange, modules = interpreter._patch_lang, set()

    def first(fn: Any) -> Any:
        scope = interpreter._LangPatchScope()
        if id(fn.__globals__) not in modules:
            modules.add(id(fn.__globals__))
            scope = exchange(fn)
            restore = scope.restore
            # Called at the end of a launch alone: what a call within it exchanges stays.
            scope.restore = lambda: (modules.clear(), restore())
        return scope

    interpreter._patch_lang = first


def _remember_members() -> None:
    """Look for the functions of a module or class once, and make what they are exchanged for once."""
    checked = tl.core.builtin(lambda: None).__code__
    known: dict[Any, list[tuple[str, Any, Any]]] = {}

    def interpreted(member: Callable) -> Callable:
        # Nothing but the check that there is a `_semantic`.
        fn = member.__wrapped__ if getattr(member, "__code__", None) is checked else member

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return fn(*args, **kwargs)

        return call

    def patch(pkg: Any, builder: Any, scope: Any) -> None:
        if pkg not in known:
            found = [(name, member) for name, member in inspect.getmembers(pkg) if tl.core.is_builtin(member)]
            known[pkg] = [(name, member, interpreted(member)) for name, member in found]
        for name, member, call in known[pkg]:
            if getattr(pkg, name) is member:
                scope.set_attr(pkg, name, call)

    interpreter._patch_builtin = patch


def _ask_for_overflow_in_debug_alone() -> None:
    check = TritonSemantic.binary_op_sanitize_overflow_impl

    @functools.wraps(check)
    def asked(self: Any, *args: Any) -> None:
        if self.builder.options.debug:  # otherwise `device_assert`, where the check ends, does nothing
            check(self, *args)

    TritonSemantic.binary_op_sanitize_overflow_impl = asked


def _remember_dtypes() -> None:
    """That of numpy for each scalar type, by name."""
    find, known = interpreter._get_np_dtype, {}

    def found(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in known:
            known[name] = find(kind)
        return known[name]

    interpreter._get_np_dtype = found


def _share_shapes() -> None:
    """Make one object of all equal shapes of types, and one of all equal shapes of tensors."""
    make_type, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    of_types: dict[builtins.tuple, tuple[tl.tuple, int]] = {}
    of_tensors: dict[int, tuple[tl.tuple, tl.constexpr]] = {}  # by the identity of those of types, which stay
    scalar = (tl.tuple([]), tl.constexpr(1))

    def new_type(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
        key = builtins.tuple([s.value if isinstance(s, tl.constexpr) else s for s in shape])
        if key not in of_types:
            make_type(self, element_ty, shape)  # which checks it
            of_types[key] = self.shape, self.numel
            sizes = tl.tuple([tl.constexpr(s) for s in self.shape])
            of_tensors[id(self.shape)] = sizes, tl.constexpr(math.prod(key))
        self.element_ty = element_ty
        self.shape, self.numel = of_types[key]

    def new_tensor(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
        if not type.is_block():
            self.shape, self.numel = scalar
        elif id(type.shape) in of_tensors:
            self.shape, self.numel = of_tensors[id(type.shape)]
        else:
            make_tensor(self, handle, type)
        self.handle, self.type, self.dtype = handle, type, type.scalar

    tl.block_type.__init__, tl.tensor.__init__ = new_type, new_tensor
    # Words that hardly anyone reads; the setter is for the first type of a shape.
    tl.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>", lambda self, name: None)
