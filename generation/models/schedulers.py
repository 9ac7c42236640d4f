"""What a scheduler is: its class and its settings, held against the one that a model's files state."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipelines.errors import shortened
from ...pipelines.files.locations import is_hub_id
from ..errors import BadInput
from .files import Reader, reader

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ...pipelines.presets import SchedulerChoice

CLASS = "_class_name"
"""Of a scheduler, in its file and in what is told here."""
_FILE = "scheduler/scheduler_config.json"
_OF_FLOW = ("shift", "flow_shift", "use_flow_sigmas", "prediction_type")
"""Settings that a scheduler takes over from the one that it replaces, whatever the names are there."""


def stated(scheduler: Any) -> dict[str, Any]:
    """The class of a scheduler and all settings that it has, as JSON has them."""
    config = getattr(scheduler, "config", {})
    own = {name: config[name] for name in _defaults(type(scheduler)) if name in config}
    return {CLASS: type(scheduler).__name__, **json.loads(json.dumps(own, default=repr))}


def stated_in_files(location: str) -> dict[str, Any] | None:
    """What the files of a model say of its scheduler, as far as they say it; None where they do not.

    Args:
        location: folder or hub id, also of weights beside a base, whose scheduler it is then.

    Raises:
        BadInput: a file that cannot be had or read.
    """
    return _read(reader(location))


def _read(read: Reader) -> dict[str, Any] | None:
    base = None if read("model_index.json") is not None else (read("adapter.json") or {}).get("base")
    if base is not None:
        from ...pipelines.deep_compression.adapter_folder import base_location

        return stated_in_files(base_location(base))
    found = read(_FILE)
    if found is None:
        return None
    return {name: value for name, value in found.items() if name == CLASS or not name.startswith("_")}


def scheduler_words(told: Mapping[str, Any]) -> str:
    """A scheduler that is `stated`, or `stated_in_files`: its class, with the settings that are not its defaults."""
    from ...pipelines.presets import PresetError, SchedulerChoice
    from ...pipelines.presets.checks import scheduler_class

    name = str(told.get(CLASS))
    try:
        defaults = _defaults(scheduler_class(SchedulerChoice(name)))
    except PresetError:  # of somebody's own, whose defaults are not known
        return name
    own = {key: value for key, value in told.items() if value != defaults.get(key, value)}
    words = ", ".join(f"{key} {_value(value)}" for key, value in sorted(own.items()))
    return name + (f" ({words})" if words else "")


def _value(value: Any) -> str:
    return shortened(f"{value:g}" if isinstance(value, float) else str(value), 40)


def changed_scheduler(pipe: DiffusionPipeline, location: str) -> SchedulerChoice | None:
    """The scheduler of a loaded pipeline as a preset names it; None for that of its files, with its settings.

    Args:
        pipe: that has it.
        location: of the model's files.

    Raises:
        PresetError: no preset can name it.
    """
    from ...pipelines.presets import Preset, SchedulerChoice
    from ...pipelines.presets.checks import chosen_scheduler

    told, defaults = stated(pipe.scheduler), _defaults(type(pipe.scheduler))
    files: Mapping[str, Any] = {}  # where they are not to be had: what is written is right all the same
    if Path(location).is_dir() or is_hub_id(location):  # else of a pipeline that does not know where it is from
        with contextlib.suppress(BadInput):
            files = stated_in_files(location) or {}
    name = told.pop(CLASS)
    if files.get(CLASS) == name and all(files.get(key, defaults[key]) == value for key, value in told.items()):
        return None
    settings = {
        key: value
        for key, value in told.items()
        if value != defaults[key] or key in _OF_FLOW or files.get(key, value) != value
    }
    choice = SchedulerChoice(name, settings)
    chosen_scheduler(pipe, Preset(scheduler=choice))
    return choice


def _defaults(cls: type) -> Mapping[str, Any]:
    """Setting -> its default, as JSON has it."""
    found = {name: p.default for name, p in inspect.signature(cls).parameters.items() if p.kind is not p.VAR_KEYWORD}
    return json.loads(json.dumps(found, default=repr))
