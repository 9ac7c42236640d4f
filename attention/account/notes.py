"""What is noted of the calls of one model: choices and fallbacks, once in the log and for the report."""

from __future__ import annotations

import logging
import re


class Notes:
    """Notes in words, each with the last call of the pipeline that it was true of (see `CallRecord`).

    Args:
        model: the component's name, for the log.
        logger: that is told.
    """

    def __init__(self, model: str, logger: logging.Logger) -> None:
        self._model, self._logger = model, logger
        self._logged: set[str] = set()  # kinds of notes: a training forgets its notes at every step
        self._calls: dict[str, int] = {}

    def add(self, text: str, level: int, call: int) -> None:
        """Note what is true of a call. One that differs in its numbers alone is not logged again."""
        known = self._calls.get(text)
        if known is None or known < call:
            self._calls[text] = call
        if known is None and (kind := re.sub(r"\d[\d.,]*", "0", text)) not in self._logged:
            self._logged.add(kind)
            self._logger.log(level, "%s: %s", self._model, text)

    def keep(self, first: int) -> None:
        """Forget what was not true of any call from this one on."""
        self._calls = {text: call for text, call in self._calls.items() if call >= first}

    def forget(self) -> None:
        """Forget all of them; what was logged is not logged again."""
        self._calls = {}

    def noted(self) -> dict[str, int]:
        """All of them, each with the last call that it was true of."""
        return dict(self._calls)
