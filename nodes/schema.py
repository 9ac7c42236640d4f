"""What the installed version of ComfyUI's node schema takes."""

from __future__ import annotations

import inspect
from typing import Any


def accepted(cls: type, **arguments: Any) -> dict[str, Any]:
    """Those of some arguments that a class of `comfy_api.latest.io` has; older versions lack a few."""
    known = inspect.signature(cls).parameters
    return {name: value for name, value in arguments.items() if name in known}
