"""Which methods a request means, and with which settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from .errors import BadInput, mention, refuse_given

if TYPE_CHECKING:
    from ..attention.layout import VideoLayout
    from ..attention.methods.base import Method

DENSE = "dense"
DEFAULT_METHOD = "svg2"
DEFAULT_COMPARED = ("svg2", "radial", "svg")
MIN_SPARSE_TOKENS = 8192
"""Videos with fewer tokens stay dense unless a method is asked for: planning would cost more than it saves."""


def check_names(names: Sequence[str], compare: bool) -> None:
    """Raise BadInput for a method that there is not, and for a comparison of dense with itself."""
    from ..attention import METHODS

    for name in names:
        if name != DENSE and name not in METHODS:
            raise BadInput(
                "method", f"there is none of that name; there are {', '.join([DENSE, *METHODS])}", value=name
            )
    if compare and names and set(names) == {DENSE}:
        raise BadInput("compare", f"needs a {mention('method')} other than dense, which is always the reference")


def choose_names(asked: Sequence[str], compare: bool, tokens: int) -> tuple[list[str], str]:
    """The runs in their order, and why these (to be `worded`): dense first where it is the reference, every name once.

    Args:
        asked: methods that were given, checked; may be empty.
        compare: whether a comparison was asked for.
        tokens: length of the video's sequence in self-attention.
    """
    few = tokens < MIN_SPARSE_TOKENS
    if asked:
        names, why = list(dict.fromkeys(asked)), "as given"
    elif compare:
        names, why = list(DEFAULT_COMPARED), f"what {mention('compare')} takes without {mention('method')}"
        if few:
            why += f" (the video has {tokens:,} tokens; below {MIN_SPARSE_TOKENS:,}, dense is the choice without it)"
    else:
        names = [DENSE if few else DEFAULT_METHOD]
        why = f"the video has {tokens:,} tokens, {'fewer than' if few else 'at least'} {MIN_SPARSE_TOKENS:,}"
        why += f"; {mention('method')} {DEFAULT_METHOD if few else DENSE} for the other"
    if compare:
        names = [DENSE, *(name for name in names if name != DENSE)]
    return names, why


def check_sparse_only(names: Sequence[str], was_asked: bool, given: Mapping[str, bool]) -> None:
    """Raise BadInput when a field of sparse attention was given and all runs are dense: nothing is ignored in silence.

    Args:
        names: the runs.
        was_asked: whether they were given, and not chosen here.
        given: field -> whether it was given.
    """
    if set(names) == {DENSE}:
        why = "" if was_asked else f", and a video of fewer than {MIN_SPARSE_TOKENS:,} tokens is dense without one"
        instead = f"Add {mention('method')} {DEFAULT_METHOD}, for example"
        refuse_given(given, f"of use only with a sparse method{why}", instead)


def build_method(
    name: str,
    layout: VideoLayout,
    *,
    density: float | None = None,
    overrides: Mapping[str, Any] | None = None,
    dense_steps: int | float | None = None,
    dense_layers: int | float | None = None,
) -> Method:
    """A method with the settings of a request.

    Args:
        name: a key of `attention.METHODS`.
        layout: the token grid, which a method may need to meet a density.
        density: pairs computed over pairs in dense attention, in the sparse steps; None keeps the method's own default.
        overrides: further fields of the method.
        dense_steps, dense_layers: first steps and layers that stay dense (count or fraction); None keeps the default.

    Raises:
        BadInput: a field the method lacks, or a value it refuses.
    """
    from ..attention import METHODS
    from ..pipelines.errors import first_line

    method_class = METHODS[name]
    known = [f.name for f in fields(method_class) if f.name != "schedule"]
    for field in overrides or {}:
        if field not in known:
            raise BadInput(
                "settings", f"{name} has no such setting; it has {', '.join(known)}", value=f"{name}.{field}"
            )
    try:
        method = method_class() if density is None else method_class.for_density(layout, density)
        schedule = method.schedule
        if dense_steps is not None:
            schedule = replace(schedule, first_steps=dense_steps)
        if dense_layers is not None:
            schedule = replace(schedule, first_layers=dense_layers)
        method = replace(method, schedule=schedule, **(overrides or {}))
        method.check(layout)
        return method
    except (ValueError, TypeError) as error:
        raise BadInput("method", first_line(error).rstrip("."), value=name) from error
