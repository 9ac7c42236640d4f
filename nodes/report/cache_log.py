"""What a cache of a MODEL did, for the report node."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ...attention import RunReport
from .news import CACHED, NEVER, News, nothing


class CacheLog:
    """What was done in each sampling of the last entry of ComfyUI's queue, in sentences.

    Args:
        title: of the node.
        otherwise: what is said of a sampling of which there is nothing to say.
        logger: of the node's module, which is told the same.
    """

    def __init__(self, title: str, otherwise: str, logger: logging.Logger) -> None:
        self.title, self._otherwise, self._logger = title, otherwise, logger
        self._told: list[list[str]] = []  # of each sampling
        self._queued: str | None = None
        self._shown = 0  # of these, by a report

    def begin(self, queued: str | None) -> None:
        """A sampler starts, for an entry of the queue; None where nobody says which."""
        if queued is None or queued != self._queued:
            self._told, self._shown = [], 0
        self._told.append([])
        self._queued = queued

    def tell(self, level: int, text: str) -> None:
        """Log a sentence on the sampling that ends, and keep it."""
        self._logger.log(level, "%s: %s", self.title, text)
        self._told[-1].append(text)

    def news(self, queued: str | None = None, last: int | None = None) -> News:
        """What the report node shows in an entry of the queue.

        Args:
            queued: the entry; None where nobody says which it is.
            last: how many samplings, the last one being among them; None for those that no report has shown yet (two
                samplers may share a cache), or all of the entry where another report node has.
        """
        if not self._told:
            return nothing(NEVER)
        heading = CACHED if None not in (queued, self._queued) and queued != self._queued else ""
        first = len(self._told) - last if last else self._shown
        if last is None and not heading:
            self._shown = len(self._told)
        told = [text for texts in self._told[first if first < len(self._told) else 0 :] for text in texts]
        notes = tuple(f"{self.title}: {text}" for text in told or [self._otherwise])
        return News(RunReport("", {}, (), notes), heading)


class CachesReport:
    """The report of a MODEL without sparse attention.

    Args:
        text: what it has.
        logs: of its caches.
    """

    def __init__(self, text: str, logs: Sequence[CacheLog]) -> None:
        self._text, self._logs = text, logs

    def news(self, queued: str | None = None) -> News:
        """What the report node shows in an entry of the queue; None where nobody says which it is."""
        told = [log.news(queued) for log in self._logs]
        headings = dict.fromkeys(filter(None, [self._text, *(news.heading for news in told)]))
        notes = tuple(note for news in told for note in news.report.notes)
        return News(RunReport("", {}, (), notes), " ".join(headings))
