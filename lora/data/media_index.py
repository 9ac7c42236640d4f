"""What the files of a folder hold, looked up once and remembered in `media.json` of the cache."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from ...generation.media import Media, Undecodable
from ...generation.video import staged
from .decode import probe

logger = logging.getLogger(__name__)

_VERSION = 3
"""Of what is remembered of a file; 3 has the picture stream of videos, as shown."""


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


def look_into(files: Sequence[Path], kind: str, cache: str | None, contents: bool = False) -> dict[Path, Known]:
    """What each file holds that can be decoded; others are named in the log.

    Args:
        files: to look into, several at a time.
        kind: "videos" or "images".
        cache: folder in which it is remembered by path, size and time of the file; None for nowhere.
        contents: also hash the files, if there is a cache to remember it.
    """
    index_file = Path(cache).expanduser() / "media.json" if cache else None
    index = _read(index_file) if index_file is not None else {}
    contents = contents and index_file is not None

    def look(path: Path) -> tuple[str, Known] | None:
        try:
            stamp = _stamp(path, kind)
            facts = index.get(stamp)
            media = Media(**facts["media"]) if facts is not None else probe(path, kind)
            known = facts["content"] if facts is not None else None
            return stamp, Known(media, known or (content(path) if contents else None))
        except Undecodable as error:
            logger.warning("%s; it is left out.", error)
        except OSError as error:
            logger.warning("%s cannot be read: %s; it is left out.", path, error)
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        looked = {path: found for path, found in zip(files, pool.map(look, files), strict=True) if found is not None}
    if index_file is not None:
        index.update({stamp: {"version": _VERSION, **asdict(known)} for stamp, known in looked.values()})
        index_file.parent.mkdir(parents=True, exist_ok=True)
        with staged(index_file) as draft:
            draft.write_text(json.dumps(index, default=str), encoding="utf-8")
    return {path: known for path, (_, known) in looked.items()}


def _read(index_file: Path) -> dict[str, dict]:
    """What is remembered, by `_stamp`; entries of older versions are looked up anew."""
    if not index_file.is_file():
        return {}
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
        return {stamp: facts for stamp, facts in index.items() if facts.get("version") == _VERSION}
    except (ValueError, AttributeError):
        logger.warning("%s is damaged and is written anew.", index_file)
        return {}


def _stamp(path: Path, kind: str) -> str:
    facts = path.stat()
    return f"{kind} {path.resolve()} {facts.st_size} {facts.st_mtime_ns}"
