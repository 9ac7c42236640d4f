"""What the files of a folder hold, looked up once and remembered in `media.json` of the cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from ...generation.media.files import Media, Undecodable
from ...pipelines.files.whole_files import staged
from ..checkpoints.checkpoint import CheckpointError
from ..config import ConfigError
from ..distributed.processes import Process
from .ahead import ahead, readers
from .cache import not_kept
from .decode import kind_of, probe

logger = logging.getLogger(__name__)

_VERSION = 3
"""Of what is remembered of a file; 3 has the picture stream of videos, as shown."""
_SAVED = 256
"""Files after which the index is written, at least."""
_KINDS = get_type_hints(Media)


@dataclass(frozen=True)
class Known:
    """What is known of a file.

    Args:
        media: what it holds.
        content: hash of its bytes, or None where no one asked.
    """

    media: Media
    content: str | None


def content(path: Path) -> str:
    """The SHA-256 of a file.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def look_into(
    files: Sequence[Path], kind: str, cache: str | None, contents: bool = False, process: Process | None = None
) -> dict[Path, Known]:
    """What each file holds that can be decoded; others are named in the log.

    Args:
        files: to look into, several at a time.
        kind: "videos", "images" or "mixed".
        cache: folder in which it is remembered by path, size and time of the file; None for nowhere.
        contents: also hash the files, if there is a cache to remember it.
        process: shows how far it is; None for nowhere.

    What was found is remembered on the way, so that whoever stops it loses the last few hundred files at most.

    Raises:
        ConfigError: what is remembered cannot be read.
        CheckpointError: it cannot be written.
    """
    index_file = Path(cache).expanduser() / "media.json" if cache else None
    index = _read(index_file) if index_file is not None else {}
    contents = contents and index_file is not None

    def look(path: Path) -> tuple[str, Known] | None:
        try:
            own = kind_of(path, kind)
            stamp = _stamp(path, own)
            known = index.get(stamp) or Known(probe(path, own), None)
            return stamp, replace(known, content=content(path)) if contents and known.content is None else known
        except Undecodable as error:
            logger.warning("%s; it is left out.", error)
        except OSError as error:
            logger.warning("%s cannot be read: %s; it is left out.", path, error)
        return None

    looked: dict[Path, Known] = {}
    fresh: dict[str, Known] = {}
    unsaved = 0
    found = ahead(look, files, readers(), 64)
    shown = found if process is None else process.track(found, "looking into files", len(files))
    try:
        for path, each in zip(files, shown, strict=True):
            if each is None:
                continue
            stamp, looked[path] = each
            if index_file is not None and index.get(stamp) != looked[path]:
                fresh[stamp] = looked[path]
                unsaved += 1
                # More at a time the more there are: the index is written whole.
                if unsaved >= max(_SAVED, (len(index) + len(fresh)) // 4):
                    _write(index_file, index | fresh)
                    unsaved = 0
    except BaseException:
        if index_file is not None and unsaved:
            with contextlib.suppress(CheckpointError):  # what ends it counts
                _write(index_file, index | fresh)
        raise
    if index_file is not None and unsaved:
        _write(index_file, index | fresh)
    return looked


def _write(index_file: Path, index: Mapping[str, Known]) -> None:
    rows = {stamp: {"version": _VERSION, **asdict(known)} for stamp, known in index.items()}
    try:
        index_file.parent.mkdir(parents=True, exist_ok=True)
        with staged(index_file) as draft:
            draft.write_text(json.dumps(rows, default=str), encoding="utf-8")
    except OSError as error:
        raise not_kept(index_file.parent, error) from error


def _read(index_file: Path) -> dict[str, Known]:
    """What is remembered, by `_stamp`; files whose entries are not whole, or of older versions, are looked up anew."""
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
        entries = {stamp: _known(facts) for stamp, facts in index.items()}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"data.cache: {index_file} cannot be read: {error}. Correct that, or remove it.") from error
    except (ValueError, AttributeError, RecursionError):
        logger.warning("%s is damaged and is written anew.", index_file)
        return {}
    return {stamp: known for stamp, known in entries.items() if known is not None}


def _known(facts: Any) -> Known | None:
    """An entry of the index; None where it is of an older version or not whole."""
    try:
        if facts["version"] != _VERSION or facts["media"].keys() != _KINDS.keys():
            return None
        known = Known(Media(**facts["media"]), facts["content"])
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError):  # the last two: of a fraction
        return None
    media = known.media
    whole = all(isinstance(getattr(media, name), kind) for name, kind in _KINDS.items())
    whole = whole and min(media.height, media.width, media.frames) >= 1 and min(media.fps, media.seconds) > 0
    return known if whole and isinstance(known.content, str | None) else None


def _stamp(path: Path, kind: str) -> str:
    facts = path.stat()
    return f"{kind} {path.resolve()} {facts.st_size} {facts.st_mtime_ns}"
