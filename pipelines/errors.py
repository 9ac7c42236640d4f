"""Messages of other libraries, values and lists of names, shortened for a message of ours."""

from __future__ import annotations

from collections.abc import Sequence


def first_line(error: BaseException) -> str:
    """The first line of a message, with the second where it is but a heading; some libraries, and the hub's client,
    write pages."""
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters, the last of them dots where it is cut off."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def few_of(names: Sequence[str]) -> str:
    """The first two of some names, and how many more there are."""
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
