"""A handle that was removed does nothing any more, which a `with` over it would not show."""

from __future__ import annotations


def refuse_removed(works: object, again: str) -> None:
    """Raise a RuntimeError for a handle that is entered after it was removed.

    Args:
        works: whether it is still at work.
        again: what makes another one.
    """
    if not works:
        raise RuntimeError(f"this handle was removed, and changes nothing any more: call {again} again for another.")
