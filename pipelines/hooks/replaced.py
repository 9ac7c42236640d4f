"""Modules that a pipeline had when something was put into them, and has no more."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

logger = logging.getLogger(__name__)


class Replaced:
    """Tells of them: what was put into them is at work in none of the pipeline's steps.

    Args:
        pipe: that had the transformers.
        since: what put something into them, and then. without: what the new one does. again: what is to be done.
    """

    def __init__(self, pipe: Any, since: str, without: str, again: str) -> None:
        self._pipe, self._since, self._without, self._again = pipe, since, without, again
        self._logged: set[str] = set()

    def notes(self, transformers: Mapping[str, torch.nn.Module]) -> list[str]:
        """What to say of those that were replaced; each is logged once.

        Args:
            transformers: that the pipeline had, by their names in it, without what wraps them.
        """
        notes = [
            f"{name} was replaced after {self._since}, and the new one {self._without}: remove() this handle and "
            f"{self._again}"
            for name, transformer in transformers.items()
            if was_replaced(self._pipe, name, transformer)
        ]
        for note in notes:
            if note not in self._logged:
                self._logged.add(note)
                logger.warning(note)
        return notes


def was_replaced(pipe: Any, name: str, module: torch.nn.Module) -> bool:
    """Whether a pipeline has a component of this name that is not, and does not wrap, the module that it had."""
    components = getattr(pipe, "components", None) or {}
    return name in components and not _contains(components[name], module)


def _contains(component: object, wanted: torch.nn.Module) -> bool:
    """Whether a component is a module, in whatever wrapper."""
    return isinstance(component, torch.nn.Module) and any(module is wanted for module in component.modules())
