"""Files of LoRAs that the trainer wrote: what their header says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .run_folder import adapter_path

FACTS = "vidaccel"
"""The key of a file's header under which the trainer says what a LoRA belongs to."""


def facts_of(location: str | Path) -> dict[str, Any]:
    """What the header of a file of our trainer says; empty for any other.

    Args:
        location: of the file, or see `run_folder.adapter_path`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(adapter_path(location), "pt") as opened:
            facts = json.loads((opened.metadata() or {}).get(FACTS, "{}"))
    except (OSError, SafetensorError, ValueError):  # `NoAdapter` among them
        return {}  # another kind of file; whether it is a LoRA at all shows when it is loaded
    return facts if isinstance(facts, dict) else {}
