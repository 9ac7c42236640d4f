"""Messages of a library that would mislead, kept out of its log for as long as they are known to be wrong."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def only_logs(name: str, tells: Callable[[str], bool]) -> Iterator[None]:
    """While this lasts, a logger says only the messages of which `tells` is true."""

    def kept(record: logging.LogRecord) -> bool:
        return tells(record.getMessage())

    log = logging.getLogger(name)
    log.addFilter(kept)
    try:
        yield
    finally:
        log.removeFilter(kept)
