"""Constructors as diffusers reads them: it takes the components of a pipeline, and their types, from the signature."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, get_type_hints


def constructor_of(parent: Any, **types: type) -> Callable[..., None]:
    """The constructor of a pipeline class, where some components are of other types.

    Args:
        parent: the pipeline class.
        types: by component.
    """

    @functools.wraps(parent.__init__)
    def __init__(self: object, *args: object, **kwargs: object) -> None:
        parent.__init__(self, *args, **kwargs)

    __init__.__annotations__ = {**get_type_hints(parent.__init__), **types}
    return __init__
