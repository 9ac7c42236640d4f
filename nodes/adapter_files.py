"""The file that a menu of models/loras and a path beside it name."""

from __future__ import annotations

from pathlib import Path

from .report.wording import InputError
from .watched import Fingerprint, fingerprint, read, state_of

BY_PATH = "the path below"
"""In the menu: none of its files."""


def chosen_file(name: str, path: str, field: str) -> Path:
    """The file or folder of two inputs; the path counts when it is not empty.

    Args:
        name: of the menu. path: of the other input. field: the menu's name, for the message.

    Raises:
        InputError: neither names one.
    """
    import folder_paths

    if not path.strip() and name == BY_PATH:
        raise InputError(f"{field}: choose a file of models/loras, or give the path of one.")
    return read(path.strip() or folder_paths.get_full_path_or_raise("loras", name))


def fingerprint_of_chosen(name: str | None, path: str | None) -> Fingerprint:
    """`fingerprint` of what two inputs name."""
    import folder_paths

    place = (path or "").strip() or folder_paths.get_full_path("loras", name or BY_PATH)
    return fingerprint(state_of(place), name, path)
