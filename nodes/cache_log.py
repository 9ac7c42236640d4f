"""What a cache of a MODEL did, for the report node."""

from __future__ import annotations

from ..attention import RunReport
from .news import CACHED, NEVER, News, nothing


class CacheLog:
    """What was done in the samplings of the last entry of ComfyUI's queue, a sentence each.

    Args:
        title: of the node.
        otherwise: what is said of a sampling of which there is nothing to say.
    """

    def __init__(self, title: str, otherwise: str) -> None:
        self.title, self._otherwise = title, otherwise
        self._told: list[str] = []
        self._queued: str | None = None
        self._sampled = False

    def begin(self, queued: str | None) -> None:
        """A sampler starts, for an entry of the queue; None where nobody says which."""
        if queued is None or queued != self._queued:
            self._told = []
        self._queued, self._sampled = queued, True

    def tell(self, text: str) -> None:
        """Keep a sentence on the sampling that ends."""
        self._told.append(text)

    def news(self, queued: str | None = None) -> News:
        """What the report node shows in an entry of the queue; None where nobody says which it is."""
        if not self._sampled:
            return nothing(NEVER)
        heading = CACHED if None not in (queued, self._queued) and queued != self._queued else ""
        notes = tuple(f"{self.title}: {text}" for text in self._told or [self._otherwise])
        return News(RunReport("", {}, (), notes), heading)
