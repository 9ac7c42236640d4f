"""`PresetError`: which lever of a preset is wrong, its value, the bound, and what to do."""

from __future__ import annotations


class PresetError(ValueError):
    """A preset that cannot be read, or not be used with a pipeline.

    Args:
        lever: the field of the preset ("cache", "quantize"); "" for the preset as a whole.
        problem: with the bound, without a full stop.
        fix: what to do, whole sentences.
        value: of the field, kept as text; "" where the problem says it.
    """

    def __init__(self, lever: str, problem: str, fix: str = "", value: object = "") -> None:
        value = str(value)
        self.lever, self.problem, self.fix, self.value = lever, problem, fix, value
        head = f"{lever} is {value}: " if value != "" else f"{lever}: " if lever else ""
        super().__init__(f"{head}{problem}.{f' {fix}' if fix else ''}")

    def __reduce__(self) -> tuple:
        return PresetError, (self.lever, self.problem, self.fix, self.value)


class UnfitCacheError(PresetError):
    """A cache that a model or its scheduler cannot have, whatever its settings are.

    Args:
        problem: see `PresetError`. cache: its name.
    """

    def __init__(self, problem: str, cache: str) -> None:
        super().__init__("cache", problem, "Take another cache, or leave it out.", cache)
