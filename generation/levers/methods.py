"""Which methods a request means, and with which settings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from ...pipelines.default_method import DEFAULT_METHOD as DEFAULT_METHOD
from ...pipelines.default_method import MIN_SPARSE_TOKENS as MIN_SPARSE_TOKENS
from ...pipelines.nearest_name import nearest
from ..errors import BadInput, mention, refuse_given

if TYPE_CHECKING:
    from ...attention.layout import VideoLayout
    from ...attention.methods.base import Method

DENSE = "dense"
DEFAULT_COMPARED = ("tangent", "svg2", "radial")
SET_BY_DENSITY = {
    "radial": ("decay", "rule"),
    "svg2": ("top_p", "min_ratio"),
    "sparge": ("topk", "cdf"),
    "sla": ("topk",),
    "tangent": ("tolerance",),
}
"""Method -> the settings, beside `density`, that a density decides or puts out of use."""
_ONE_OF = {"sparge": ("topk", "cdf")}
"""Method -> settings of which each stands instead of the others."""
_NEAR = 0.04
"""A density that is off by no more than this share of it is met; SVG's temporal heads may be 3 % below theirs."""


def check_methods(runs: Sequence[str | Method], compare: bool, levers: bool = False) -> None:
    """Raise BadInput for the name of a method that there is not, and for a comparison of dense with itself.

    A config may be of a method that has no name here: of somebody's own. With `levers`, which the reference has not,
    dense is another run than that.
    """
    from ...attention import METHODS

    for run in runs:
        if isinstance(run, str) and run != DENSE and run not in METHODS:
            raise BadInput("method", f"there is none of that name{nearest(run, [DENSE, *METHODS])}", value=run)
    if compare and runs and set(map(name_of, runs)) == {DENSE} and not levers:
        problem = f"needs a {mention('method')} other than dense, which is always the reference"
        fix = f"Give one, or {mention('cache')} or {mention('compile')}; all of a preset is for vidaccel waterfall."
        raise BadInput("compare", problem, fix)


def choose_runs(
    asked: Sequence[str | Method],
    compare: bool,
    tokens: int,
    trained_for: str = "",
    least: int | None = None,
    few_steps: int | None = None,
) -> tuple[list[str | Method], str]:
    """The runs in their order, and why these (to be `worded`): dense first where it is the reference, every run once.

    Args:
        asked: names and configs that were given, checked; may be empty.
        compare: whether a comparison was asked for.
        tokens: length of the video's sequence in self-attention.
        trained_for: the method that the model was trained for; "" for none.
        least: tokens from which sparse is the choice; None for `MIN_SPARSE_TOKENS`.
        few_steps: steps that the model was distilled to with attention to all; None for none.
    """
    least = MIN_SPARSE_TOKENS if least is None else least
    few = tokens < least
    runs: list[str | Method]
    if asked:
        runs, why = list(dict.fromkeys(asked)), "as given"
    elif trained_for:
        runs, why = [trained_for], f"the model was trained for it; {mention('method')} {DENSE} for attention to all"
    elif compare:
        runs, why = list(DEFAULT_COMPARED), f"what {mention('compare')} takes without {mention('method')}"
        if few:
            why += f" (the video has {tokens:,} tokens; below {least:,}, dense is the choice without it)"
    elif few_steps is not None:
        runs, why = [DENSE], f"{_distilled(few_steps)}; {mention('method')} {DEFAULT_METHOD} for the other"
    else:
        runs = [DENSE if few else DEFAULT_METHOD]
        why = f"the video has {tokens:,} tokens, {'fewer than' if few else 'at least'} {least:,}"
        why += f"; {mention('method')} {DEFAULT_METHOD if few else DENSE} for the other"
    if compare:
        runs = [DENSE, *(run for run in runs if run != DENSE)]
    return runs, why


def _distilled(steps: int) -> str:
    return f"the model was distilled to {steps} steps with attention to all, and each step counts"


def name_of(run: str | Method) -> str:
    """The name of the method of a run."""
    return run if isinstance(run, str) else run.name


def check_sparse_only(
    names: Sequence[str],
    was_asked: bool,
    given: Mapping[str, bool],
    least: int | None = None,
    few_steps: int | None = None,
) -> None:
    """Raise BadInput when a field of sparse attention was given and all runs are dense: nothing is ignored in silence.

    Args:
        names: the runs.
        was_asked: whether they were given, and not chosen here.
        given: field -> whether it was given.
        least, few_steps: see `choose_runs`.
    """
    least = MIN_SPARSE_TOKENS if least is None else least
    if set(names) == {DENSE}:
        short = f"a video of fewer than {least:,} tokens is dense without one"
        why = "" if was_asked else f", and {short if few_steps is None else _distilled(few_steps)}"
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
    base: Method | None = None,
) -> Method:
    """A method with the settings of a request.

    Args:
        name: a key of `attention.METHODS`.
        layout: the token grid, which a method may need to meet a density.
        density: pairs computed over pairs in dense attention, in the sparse steps; None keeps the method's own default.
        overrides: further fields of the method, none that the density decides.
        dense_steps, dense_layers: first steps and layers that stay dense (count or fraction); None keeps the default.
        base: of this name, whose own settings and schedule hold where the request says nothing. None for the method as
            it is by default.

    Raises:
        BadInput: a field the method lacks, one that the density decides, or a value it refuses.
    """
    from ...attention import METHODS
    from ...pipelines.errors import first_line

    method_class = METHODS[name]
    settings = dict(overrides or {})
    check_settings(name, settings, density)
    schedule = method_class().schedule if base is None else base.schedule
    if base is not None:
        settings = {**_kept(base, settings, density), "schedule": schedule, **settings}
    try:
        # All at once: one setting can decide what another may be, and what a method makes of those that are left out.
        changed = {"first_steps": dense_steps, "first_layers": dense_layers}
        changed = {field: value for field, value in changed.items() if value is not None}
        if changed:
            settings["schedule"] = replace(schedule, **changed)
        if density is None:
            method = method_class(**settings)
        else:
            method = method_class.for_density(layout, density, **settings)
        method.check(layout)
        return method
    except (ValueError, TypeError) as error:
        raise BadInput("method", first_line(error).rstrip("."), value=name) from error


def _kept(base: Method, overrides: Mapping[str, Any], density: float | None) -> dict[str, Any]:
    """What a config has other than its method by default, but those that a setting which is asked for is instead of."""
    of_density = SET_BY_DENSITY.get(base.name, ())
    gone: set[str] = set()
    if density is not None or "density" in overrides:
        gone = {"density", *of_density}
    elif any(name in of_density for name in overrides):
        gone = {"density", *_ONE_OF.get(base.name, ())}
    default = type(base)()
    own = {f.name: getattr(base, f.name) for f in fields(base) if f.name != "schedule" and f.name not in gone}
    return {name: value for name, value in own.items() if value != getattr(default, name)}


def check_settings(name: str, settings: Mapping[str, Any], density: float | None) -> None:
    """Raise BadInput for settings that a method lacks, and for those that are given twice, once by the density."""
    from ...attention import METHODS

    known = [f.name for f in fields(METHODS[name]) if f.name != "schedule"]
    for field in settings:
        if field not in known:
            problem = f"{name} has no such setting{nearest(field, known)}"
            raise BadInput("settings", problem, value=f"{name}.{field}")
        if density is not None and field in ("density", *SET_BY_DENSITY.get(name, ())):
            problem = f"{mention('density')} {density:g} decides it"
            raise BadInput("settings", problem, "Give one of the two.", value=f"{name}.{field}")


def trained_note(trained_for: str, methods: Mapping[str, Method | None], compare: bool) -> str:
    """What to say of runs of a model without what it learned for the method that it was trained for; else ""."""
    without = [label for label, m in methods.items() if m is None or m.name != trained_for or not m.needs_weights]
    if not trained_for or not without:
        return ""
    note = f"The model was trained for {trained_for}: {' and '.join(without)} runs without what it learned for that"
    if compare and next(iter(methods)) in without:
        note += ", and as the reference it is another model, so that distances from it are no measure of quality"
    return f"{note}."


def expected_note(label: str, method: Method, layout: VideoLayout, asked: float | None) -> str:
    """What the density will be instead of the one asked for, where that is known before the run; else ""."""
    expected = method.expected_density(layout)
    if asked is None or expected is None or abs(expected - asked) <= _NEAR * asked:
        return ""
    return f"{label}: density {asked:g} cannot be met on this video; the nearest is {expected:.3f}."


def whole_note(label: str, method: Method, layout: VideoLayout, asked: float | None) -> str:
    """That a method skips nothing of a video, where the grid alone decides it and no density was asked for; else ""."""
    settings = {field.name for field in fields(method)}
    if asked is not None or "density" in settings or method.expected_density(layout) != 1:
        return ""
    return f"{label}: its plan covers all pairs of this video, so nothing is skipped; give {mention('density')}."


def measured_note(label: str, measured: float, expected: float) -> str:
    """What the density of the sparse calls of a run was, where it is not the one expected; else ""."""
    if abs(measured - expected) <= _NEAR * expected:
        return ""
    return f"{label}: density {expected:g} was not met; its sparse calls computed {measured:.3f} of the pairs."


def labels(methods: Sequence[Method]) -> list[str]:
    """A name for each run, which can be part of a file's name: that of its method, and where several runs have one
    method, the settings in which they differ ("svg2-top_p=0.8"), but for those that one leaves out (None)."""
    told = [_settings(method) for method in methods]
    made = []
    for method, settings in zip(methods, told, strict=True):
        peers = [other for other, its in zip(told, methods, strict=True) if its.name == method.name]
        differing = [f"{key}={value}" for key, value in settings.items() if any(p.get(key) != value for p in peers)]
        made.append("-".join([method.name, *differing]))
    return made


def _settings(method: Method) -> dict[str, str]:
    """Field that is not None -> value as a text of letters, digits and what file names may have; those of the schedule
    among them."""
    values = {f.name: getattr(method, f.name) for f in fields(method) if f.name != "schedule"}
    values |= {f.name: getattr(method.schedule, f.name) for f in fields(method.schedule)}
    return {name: re.sub(r"[^\w.+-]+", "_", repr(value)) for name, value in values.items() if value is not None}
