"""What a request asks for of sparse attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import BadInput
from ..levers.methods import name_of
from ..machine import check_precision
from .values import count_or_share, number, text

if TYPE_CHECKING:
    from ...attention.methods.base import Method


@dataclass(frozen=True)
class Sparse:
    """What is asked for of sparse attention; None keeps the method's default.

    Args:
        methods: names, or configs with all their settings; none for the default (see `methods.choose_runs`).
        density: pairs computed over all pairs, in sparse steps.
        dense_steps, dense_layers: first steps and layers that stay dense: a count (int) or a fraction (float).
        overrides: method -> field -> value.
        backend: a name, which then runs or raises, or "auto".
        measure_error, precision: see `accelerate`.

    Raises:
        BadInput: a value of another kind or out of its bounds.
    """

    methods: Sequence[str | Method] = ()
    density: float | None = None
    dense_steps: int | float | None = None
    dense_layers: int | float | None = None
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    backend: str = "auto"
    measure_error: int = 0
    precision: str | None = None

    def __post_init__(self) -> None:
        _check_methods(self.methods)
        text("backend", self.backend)
        if self.density is not None:
            object.__setattr__(self, "density", number("density", self.density))
            if not 0 < self.density <= 1:
                raise BadInput("density", "it must be above 0 and at most 1 (1 is dense)", value=self.density)
        for name in ("dense_steps", "dense_layers"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, count_or_share(name, getattr(self, name)))
        if not isinstance(self.overrides, Mapping) or any(not isinstance(v, Mapping) for v in self.overrides.values()):
            problem = 'they must be settings by method, such as {"svg2": {"top_p": 0.85}}'
            raise BadInput("settings", problem, value=repr(self.overrides))
        rows = self.measure_error
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 0:
            problem = "it must be a whole number of queries, 0 or more (0 measures nothing)"
            raise BadInput("measure_error", problem, value=rows)
        check_precision(self.precision)

    @property
    def names(self) -> list[str]:
        """Of the methods."""
        return [name_of(method) for method in self.methods]

    def given(self) -> dict[str, bool]:
        """The fields that only a sparse method has, and whether they were given."""
        return {
            "density": self.density is not None,
            "dense_steps": self.dense_steps is not None,
            "dense_layers": self.dense_layers is not None,
            "settings": bool(self.overrides),
            "backend": self.backend != "auto",
            "measure_error": bool(self.measure_error),
            "precision": self.precision is not None,
        }


def _check_methods(methods: Sequence[Any]) -> None:
    """Raise BadInput for what is neither a name nor a config, and for a config that is none of a method."""
    from ...attention.methods.base import Method, check_config

    for method in methods:
        if isinstance(method, type) and issubclass(method, Method):
            name = getattr(method, "name", method.__name__)
            raise BadInput("method", "it is the class, not a config", f"Give {method.__name__}().", value=name)
        if not isinstance(method, str | Method):
            raise BadInput("method", "it must be a name, or a config such as SVG2()", value=repr(method))
        if isinstance(method, Method):
            try:
                check_config(method)
            except TypeError as error:
                raise BadInput("method", str(error).rstrip("."), value=repr(method)) from error
