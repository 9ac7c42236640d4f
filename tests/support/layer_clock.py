"""A clock for tests of `tune`, which no other work on the machine moves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def layer_clock(pipe: Any) -> Iterator[Any]:
    """`clock()`: self-attention layers of a Wan pipeline that ran so far, one a second."""
    count = [0]
    hooks = [
        block.attn1.register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
        for block in pipe.transformer.blocks
    ]
    yield lambda: float(count[0])
    for hook in hooks:
        hook.remove()
