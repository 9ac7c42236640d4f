"""Messages of other libraries, shortened for a message of ours."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of a message, with the second where it is but a heading; some libraries, and the hub's client,
    write pages."""
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first
