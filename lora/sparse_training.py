"""Sparse attention on the transformer that is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..attention.backends import check_backend
from ..attention.layout import VideoLayout
from ..generation.errors import BadInput
from ..generation.levers.methods import DENSE, build_method, check_methods
from ..pipelines.acceleration.families import FAMILIES
from .config import ConfigError


def training_method(
    name: str,
    density: float | None,
    dense_layers: int | None,
    block_size: int | None,
    backend: str,
    transformer_class: str,
    layouts: Sequence[VideoLayout | None],
) -> Any:
    """The method of a training, or None for dense attention.

    All noise levels are sparse: those of a step differ from clip to clip, and none is the first of a run.

    Args:
        name: "dense", or of `attention.METHODS`.
        density: share of the pairs, at the last layout; None for the method's own.
        dense_layers: first layers that stay dense; None for the method's own.
        block_size: of the method; None for its own.
        backend: what computes it, a name or "auto".
        transformer_class: name of the transformer's class.
        layouts: the tokens of the clips, one a size.

    Raises:
        ConfigError: there is no such method or backend, the model takes none, or one that cannot do a size.
    """
    if name == DENSE:
        return None
    check_takes_sparse(f"attention.method is {name}", transformer_class, layouts)
    try:
        check_methods([name], compare=False)
        overrides = {} if block_size is None else {"block_size": block_size}
        method = build_method(
            name, layouts[-1], density=density, overrides=overrides, dense_steps=0, dense_layers=dense_layers
        )
    except BadInput as error:
        raise ConfigError(f"attention.{error}") from error
    if method.needs_weights:
        fix = "use the recipe sla" if name == "sla" else "no recipe trains them, so take another"
        raise ConfigError(f"attention.method is {name}, which learns weights of its own: {fix}.")
    try:
        check_backend(backend)
        for layout in layouts:
            method.check(layout)
    except ValueError as error:
        raise ConfigError(f"attention: {error}") from error
    return method


def check_takes_sparse(asked: str, transformer_class: str, layouts: Sequence[VideoLayout | None]) -> None:
    """Raise ConfigError for a model that trains with dense attention alone.

    Args:
        asked: what was asked for, as the start of a sentence.
        transformer_class: name of the transformer's class.
        layouts: the tokens of the clips, one a size.
    """
    if not any(transformer_class in family.transformers for family in FAMILIES) or None in layouts:
        raise ConfigError(f"{asked}, but a {transformer_class} trains with dense attention alone.")
