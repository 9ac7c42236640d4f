"""Which cache over steps is in a transformer, and whose it is: a preset's, or somebody else's."""

from __future__ import annotations

import logging
from typing import Any

from diffusers import TextKVCacheConfig

from ..hooks.diffusers_hooks import FORECAST_HOOK, hooks_of
from ..hooks.hooked import handles_on
from ..hooks.undo import PRESET
from .errors import PresetError
from .levers import FORECAST

logger = logging.getLogger(__name__)

CACHE_DIT = "cache-dit"


def library_cache(transformer: Any) -> Any | None:
    """The config of diffusers' cache in a transformer, `CACHE_DIT` for one of cache-dit, None without any."""
    config = getattr(transformer, "_cache_config", None)
    if config is None and getattr(transformer, "_is_cached", False):
        return CACHE_DIT
    # That one leaves nothing out that would be another in the next step.
    return None if isinstance(config, TextKVCacheConfig) else config


def check_no_cache(part: str, transformer: Any, lever: str, value: str) -> None:
    """Raise PresetError where a transformer has a cache, of another preset or put in by hand: nobody would tell it what
    is kept dense.

    Args:
        part: name of the transformer.
        transformer: without what wraps it.
        lever: of the preset, which it gets in the way of. value: of that.
    """
    presets = [handle.preset for handle in handles_on(transformer, PRESET) if handle.preset.cache is not None]
    if presets:
        found = f"the cache {presets[0].cache.name} of the preset {presets[0].name}"
        undo = "remove() on its handle, or vidaccel.restore(pipe),"
    elif FORECAST_HOOK in hooks_of(transformer):
        found, undo = f"the cache {FORECAST} of a preset", "vidaccel.restore(pipe)"
    elif (config := library_cache(transformer)) is not None:
        found, undo = _name(config), _way_out(part, config)
    else:
        return
    problem, fix = f"the {part} has {found} already", f"Call {undo} first"
    if lever == "method":
        problem += ", which skips attention of steps that the schedule keeps dense, too"
        fix += ", and give the preset a cache instead, if it shall have one"
    raise PresetError(lever, problem, f"{fix}.", value)


class OnlyCache:
    """Whether the cache of a preset is still there, and the only one.

    Args:
        part: name of the transformer.
        transformer: without what wraps it, in which the cache was just installed.
        cache: its name.
    """

    def __init__(self, part: str, transformer: Any, cache: str) -> None:
        self._part, self._transformer, self._cache = part, transformer, cache
        self._library = library_cache(transformer)
        self._logged = False

    def notes(self) -> list[str]:
        """What to say where it is not; logged once."""
        now = library_cache(self._transformer)
        if now is self._library:
            return []
        if self._library is not None:
            gone = f"the preset's cache {self._cache} was taken out of the {self._part} by disable_cache()"
            what = "nothing was skipped since" if now is None else f"{_name(now)} is in its place"
            note = f"{gone}, and {what}: remove() this handle and apply the preset again"
        else:
            note = (
                f"{_name(now)} came into the {self._part} beside the preset's cache {self._cache}; it knows of no step "
                f"that is to be computed, and what it makes of steps is forecast from: call {_way_out(self._part, now)}"
            )
        if not self._logged:
            self._logged = True
            logger.warning(note)
        return [note]


def _name(config: Any) -> str:
    return CACHE_DIT if config is CACHE_DIT else type(config).__name__


def _way_out(part: str, config: Any) -> str:
    return f"cache_dit.disable_cache({part})" if config is CACHE_DIT else f"{part}.disable_cache()"
