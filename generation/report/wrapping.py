"""Long names in lines, for pictures and charts, which do not break them by themselves."""

from __future__ import annotations

import re
from collections.abc import Callable


def wrapped(name: str, width: Callable[[str], float], most: float) -> str:
    """A name in lines of at most a width, broken where its parts meet; within a part that is too long itself.

    Args:
        name: such as "tangent-density=0.7".
        width: of a text, in any unit.
        most: of a line, in the same.
    """
    lines, line = [], ""
    for part in re.split(r"(?<=[- ])", name):
        if line and width(line + part) > most:
            lines.append(line)
            line = ""
        while width(part) > most and len(part) > 1:
            end = next((n for n in range(len(part) - 1, 1, -1) if width(part[:n]) <= most), 1)
            lines.append(part[:end])
            part = part[end:]
        line += part
    return "\n".join([*lines, line])
