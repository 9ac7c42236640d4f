"""The cache of what is converted to diffusers' layout: where it lies, whether it is whole, and what it was made of."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path


def conversion_place(name: str, stamp: Sequence[str]) -> Path:
    """The folder of a conversion, there or not, in `VIDACCEL_CACHE`, else `~/.cache/vidaccel`.

    Args:
        name: begins that of the folder.
        stamp: what it is made of and how, see `stamps`.
    """
    key = hashlib.sha256("\n".join(stamp).encode()).hexdigest()[:16]
    return Path(os.environ.get("VIDACCEL_CACHE", "~/.cache/vidaccel")).expanduser() / "converted" / f"{name}-{key}"


def stamps(place: str | Path | None) -> list[str]:
    """Path, size and time of a file, or of all files in a folder; the name alone of what is not on this machine."""
    path = Path(place or "").expanduser().resolve()
    if place is None or not path.exists():
        return [str(place)]
    files = [path] if path.is_file() else sorted(file for file in files_below(path) if file.is_file())
    return [str(path), *(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)]


def is_whole(folder: Path) -> bool:
    """Whether a conversion is there, and every file that it links to."""
    if not (folder / "model_index.json").is_file():
        return False
    parts = [list(files_below(path)) if path.is_dir() else [path] for path in folder.iterdir()]
    return all(files and all(file.exists() for file in files) for files in parts)


def discard(folder: Path) -> None:
    """Remove a conversion. Links go; what they lead to stays."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.old.part")
    with suppress(FileNotFoundError):  # Another process was first.
        os.replace(folder, aside)
        shutil.rmtree(aside)


def files_below(folder: Path) -> Iterator[Path]:
    """Files in a folder and in those that links in it lead to, also links that lead nowhere."""
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(place) / name for name in sorted(names))
