"""The packages that the levers of a preset need, besides those that vidaccel itself does."""

from __future__ import annotations

import importlib.util

from .errors import PresetError
from .levers import CACHES
from .preset import Preset


def check_packages(preset: Preset) -> None:
    """Raise PresetError, with the line that installs it, where a package is missing."""
    if preset.cache is not None and (package := CACHES[preset.cache.name].package):
        _check("cache", preset.cache.name, package)
    if preset.quantize is not None:
        _check("quantize", preset.quantize.kind, "torchao")


def _check(lever: str, value: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        fix = f"Install it: pip install {package.replace('_', '-')}."
        raise PresetError(lever, f"the package {package} is not installed", fix, value)
