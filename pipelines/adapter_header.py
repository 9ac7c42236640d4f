"""Files of LoRAs that the trainer wrote: where they are, and what their header says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = "pytorch_lora_weights.safetensors"
FACTS = "vidaccel"
"""The key of a file's header under which the trainer says what a LoRA belongs to."""


def adapter_path(location: str | Path) -> Path:
    """The file in a folder that diffusers and our trainer write; the path itself where there is none."""
    path = Path(location).expanduser()
    return path / FILE if (path / FILE).is_file() else path


def facts_of(location: str | Path) -> dict[str, Any]:
    """What the header of a file of our trainer says; empty for any other.

    Args:
        location: of the file, or of the folder of a `pytorch_lora_weights` file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(adapter_path(location), "pt") as opened:
            facts = json.loads((opened.metadata() or {}).get(FACTS, "{}"))
    except (OSError, SafetensorError, ValueError):
        return {}  # another kind of file; whether it is a LoRA at all shows when it is loaded
    return facts if isinstance(facts, dict) else {}
