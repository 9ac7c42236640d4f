"""JSON files beside weights: those that a folder gets, and what a transformer states that it was trained for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .plain_content import object_in
from .weight_files import transformer_file
from .whole_files import write_bytes


def write_json(path: Path, content: Any) -> Path:
    """Write a whole file as people read it, or nothing.

    Raises:
        NotWritten: it cannot be written, which names it.
    """
    return write_bytes((json.dumps(content, indent=2) + "\n").encode(), path)


def stated(base: str, part: str, name: str, error: type[ValueError]) -> tuple[Any, Path] | None:
    """The content of a file of a transformer, and where it is; None where there is no such file.

    Args:
        base: folder or hub id of the pipeline. part: name of the transformer in it, "" where it is alone.
        name: of the file.
        error: what is raised where it cannot be read.
    """
    path = transformer_file(base, name, part)
    if path is None:
        return None
    try:
        return object_in(path), path
    except (OSError, ValueError) as fault:
        raise error(f"{path} cannot be read: {fault}") from fault
