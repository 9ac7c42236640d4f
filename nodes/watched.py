"""Whether files that nodes read have changed since, for `fingerprint_inputs`.

ComfyUI runs a node again when its inputs change; with this, also when the file does that they name, such as one that
was trained anew.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..pipelines.files.run_folder import NoAdapter, adapter_path

State = tuple[tuple[str, int, int], ...]
Fingerprint = State | None | tuple[State | None, int]


class Watched:
    """Places that nodes read or wrote, and how often one of them has changed since.

    ComfyUI gives `fingerprint_inputs` None for an input with a link. What comes through the link is known once the node
    runs, so it is remembered from there.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], tuple[Callable[[], object], object]] = {}
        self._changes = 0

    def remember(self, place: str | Path, state: Callable[[], object], kind: str = "") -> None:
        """A node has read or written a place, whose `state` is looked at from now on.

        Args:
            kind: of the state, where nodes look at one place in several ways.
        """
        key, now = (str(place), kind), state()
        # Others may have read it before, and what they made of it is old.
        self._changes += key in self._known and self._known[key][1] != now
        self._known[key] = state, now

    def changes(self) -> int:
        """How often it was seen that some place was not as a node had left it. Such a one is watched again once a node
        has come to it again."""
        changed = [key for key, (state, known) in self._known.items() if state() != known]
        for key in changed:
            del self._known[key]
        self._changes += bool(changed)
        return self._changes


READ = Watched()
"""Files and folders that nodes have read."""


def read(place: str | Path, state: Callable[[Path], object] | None = None) -> Path:
    """The path of a place that a node reads now, which is watched from here on.

    Args:
        place: a file or a folder. state: tells whether it has changed; None for `state_of`.
    """
    path, look = Path(place).expanduser(), state or state_of
    READ.remember(path, lambda: look(path), look.__name__)
    return path


def fingerprint(state: State | None, *given: str | None) -> Fingerprint:
    """A state, with all that nodes have read where it may be that of something else.

    Args:
        state: of what the inputs name, as far as they are known.
        given: these inputs; None for one with a link.
    """
    return (state, READ.changes()) if None in given else state


def state_of(place: str | Path | None) -> State | None:
    """Names, times of the last change in nanoseconds and bytes of a file, or of the files in a folder.

    Of the folder of a run, those of the adapter that it stands for.

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
