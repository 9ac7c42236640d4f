"""A name that there is not: the one that may be meant, and all that there are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; there are x, y", before that the one that is like it, which need not be the one that is meant.

    It goes on after "there is none of that name", without a full stop.
    """
    known = list(known)
    close = difflib.get_close_matches(name.lower(), known, n=1)
    there_are = f"here are {', '.join(known)}"
    return f"; did you mean {close[0]}? T{there_are}" if close else f"; t{there_are}"
