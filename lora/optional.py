"""Packages that only some settings need: one clear error where they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from .config import ConfigError


def optional(module: str, setting: str, package: str | None = None) -> ModuleType:
    """A module of a package that need not be installed.

    Args:
        module: its name.
        setting: that needs it, as it reads in a message: "train.optimizer is muon".
        package: the name under which pip knows it; None for the first part of the module's.

    Raises:
        ConfigError: it is missing, or does not run here.
    """
    root = module.partition(".")[0]
    package = package or root
    try:
        importlib.import_module(root)
        return importlib.import_module(module)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == root:
            raise ConfigError(f"{setting}, which needs {package}: pip install {package}") from None
        raise ConfigError(f"{setting}, but the installed {package} cannot be imported: {error}") from error
