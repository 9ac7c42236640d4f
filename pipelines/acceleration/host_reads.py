"""What the host reads of tensors on a device, once for as long as they are the same.

To read, the host waits for all that was launched before, and the device then stands still until it gets work again.
Pipelines hand the same mask, coordinates and timestep to one pass after another.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

Value = TypeVar("Value")


def read_once(read: Callable[..., Value]) -> Callable[..., Value]:
    """A function of tensors, called again only with others, or after they were written to.

    Tensors of inference mode do not tell whether they were written to, and are read each time.
    """
    known = WeakTensorKeyDictionary()

    @functools.wraps(read)
    def reading(first: torch.Tensor, *more: torch.Tensor) -> Value:
        if any(x.is_inference() for x in (first, *more)):
            return read(first, *more)
        now = tuple(x._version for x in (first, *more))
        versions, others, value = known.get(first, (None, (), None))
        if versions != now or any(other() is not x for other, x in zip(others, more, strict=True)):
            value = read(first, *more)
            known[first] = (now, tuple(weakref.ref(x) for x in more), value)
        return value

    return reading


def place_in(whole: torch.Tensor, part: torch.Tensor) -> int | None:
    """Which element of `whole [N]` all of `part` is a view of, told without a look at values; None where it is none."""
    one_element = all(size == 1 or stride == 0 for size, stride in zip(part.shape, part.stride(), strict=True))
    alike = (part.dtype, part.device) == (whole.dtype, whole.device)
    if not (one_element and alike and whole.stride(0) and _memory(part) == _memory(whole)):
        return None
    place, rest = divmod(int(part.storage_offset()) - int(whole.storage_offset()), whole.stride(0))
    return place if not rest and 0 <= place < len(whole) else None


def _memory(x: torch.Tensor) -> Any:
    """Whose memory it is: alike for all views of a tensor."""
    return x.untyped_storage()._cdata
