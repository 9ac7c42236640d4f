"""What the texts of options mean, checked before anything is loaded."""

from __future__ import annotations

import ast
import contextlib
from typing import Any

from ..generation.errors import BadInput
from ..generation.values import count_or_share


def amount(field: str, text: str | None) -> int | float | None:
    """A count ("4") or a fraction ("0.2"); BadInput for anything else."""
    if text is None:
        return None
    value: Any = text
    with contextlib.suppress(ValueError):
        value = int(text) if text.lstrip("+-").isdigit() else float(text)
    return count_or_share(field, value)


def method_settings(texts: list[str]) -> dict[str, dict[str, Any]]:
    """`["svg2.top_p=0.8"]` -> `{"svg2": {"top_p": 0.8}}`; BadInput for what has another form."""
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        target, equals, value = text.partition("=")
        method, dot, field = target.strip().partition(".")
        if not (equals and dot and method and field):
            raise BadInput("settings", "it has the form METHOD.SETTING=VALUE, such as svg2.top_p=0.85", value=text)
        try:
            found.setdefault(method, {})[field] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            # A bare word, as in rule=published.
            found.setdefault(method, {})[field] = value.strip()
    return found
