"""Triton's interpreter without what it does over and over.

At each launch it exchanges the functions of `triton.language` for its own, and looks for them again at each call of
one `triton.jit` function by another, where none is left. That took a quarter of the time of the kernels' tests.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter


def exchange_once_a_launch() -> None:
    """Let the calls within a launch find the language as its first call left it."""
    if not hasattr(interpreter, "_LangPatchScope"):  # another version of Triton
        return
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
