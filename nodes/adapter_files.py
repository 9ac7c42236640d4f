"""The file that a menu of models/loras and a path beside it name, and whether what was read has changed since."""

from __future__ import annotations

from pathlib import Path

from ..pipelines.files.run_folder import NoAdapter, adapter_path
from .report.wording import InputError

BY_PATH = "the path below"
"""In the menu: none of its files."""

State = tuple[tuple[str, int, int], ...]


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
    return Path(path.strip() or folder_paths.get_full_path_or_raise("loras", name)).expanduser()


def state_of_chosen(name: str | None, path: str | None) -> State | None:
    """`state_of` what two inputs name, for `fingerprint_inputs`, which is given None for an input with a link."""
    import folder_paths

    return state_of((path or "").strip() or folder_paths.get_full_path("loras", name or BY_PATH))


def state_of(place: str | Path | None) -> State | None:
    """Names, times of the last change in nanoseconds and bytes of a file, or of the files in a folder.

    Of the folder of a run, those of the adapter that it stands for.

    ComfyUI runs a node again when its inputs change; with this, also when the file does that they name, such as one
    that was trained anew.

    Returns:
        None where there is nothing: what runs says so.
    """
    if not place:
        return None
    try:
        found = adapter_path(place)
        files = sorted(found.iterdir()) if found.is_dir() else [found]
        return tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    except (NoAdapter, OSError):
        return None


def state_of_pipeline(folder: str | Path) -> State | None:
    """The same of a pipeline of diffusers: of its `model_index.json`, and of the files of its parts.

    Returns:
        None where there is none in the folder, such as for a hub id, whose files do not change.
    """
    root = Path(folder).expanduser()
    try:
        if not (root / "model_index.json").is_file():
            return None
        parts = [part for part in root.iterdir() if part.is_dir() and not part.name.startswith(".")]
        files = [*root.iterdir(), *(file for part in parts for file in part.iterdir())]
        told = [(file.relative_to(root).as_posix(), file.stat()) for file in sorted(files) if file.is_file()]
        return tuple((name, found.st_mtime_ns, found.st_size) for name, found in told)
    except OSError:
        return None
