"""Messages of other libraries, shortened for a message of ours."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of a message; some libraries, and the hub's client, write pages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
