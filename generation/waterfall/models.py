"""The models that the stages of a preset run on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..calls import check_untouched, dtype_of
from ..levers.presets import LEVERS, refusals
from ..machine import choose_device, choose_dtype
from ..models.facts import ModelFacts
from ..models.inspected import inspect_model, inspect_pipeline
from ..requests.filled import said_of_preset
from ..requests.settings import Settings
from ..run import load
from .checks import check_named
from .stages import Stage


class Models:
    """The models of a waterfall, each loaded when it is needed first."""

    def __init__(self, given: Any, device: Any, dtype: Any, offload: bool | str, tiling: bool) -> None:
        if callable(given) and not hasattr(given, "components"):
            given = given()
        self.given = None if given is None or isinstance(given, str | Path) else given
        if self.given is not None:
            check_untouched(self.given)
        self.first_name = str(given) if isinstance(given, str | Path) else ""
        self.device = choose_device(device, offload) if self.given is None else self.given._execution_device
        self._dtype, self._offload, self._tiling = dtype, offload, tiling
        self._facts: dict[str, ModelFacts] = {}
        self._pipes: dict[str, Any] = {}
        self.notes: list[str] = []

    def _is_given(self, name: str) -> bool:
        return self.given is not None and (not self._facts or name in ("", next(iter(self._facts))))

    def facts(self, name: str) -> ModelFacts:
        """What a model is; the first that is asked for is the one that was given."""
        if name not in self._facts:
            self._facts[name] = inspect_pipeline(self.given) if self._is_given(name) else inspect_model(name)
        return self._facts[name]

    def dtype(self, name: str) -> Any:
        """Of a model."""
        if self._is_given(name):
            return dtype_of(self.given)
        return choose_dtype(self._dtype, self.device, name)

    def check_named(self, stage: Stage, settings: Settings) -> None:
        """Raise BadInput for what a preset names that is not there, or cannot be had here."""
        given, name = self.given if self._is_given(stage.model) else None, stage.model
        check_named(stage.preset, settings, self.facts(name), given, self.device, self.dtype(name))

    def check_loaded(self, plan: Sequence[Stage]) -> None:
        """Load all models, and raise BadInput where the levers cannot be put to work in theirs."""
        from ...pipelines.presets.checks import check_preset

        last = {stage.model: stage.preset for stage in plan}
        for name, preset in last.items():
            pipe = self.pipe(name)
            with said_of_preset(LEVERS), refusals():
                check_preset(pipe, preset, self.facts(name).location)

    def pipe(self, name: str) -> Any:
        """A model, loaded."""
        if name not in self._pipes:
            if self._is_given(name):
                self._pipes[name] = self.given
            else:
                self._pipes[name] = load(
                    self.facts(name), self.dtype(name), self.device, offload=self._offload, tiling=self._tiling
                )
        return self._pipes[name]
