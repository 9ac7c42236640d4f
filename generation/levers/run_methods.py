"""The methods that a job runs: made from names, from a preset's, or as they were given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import BadInput, mention, refuse_given
from ..machine import check_second_stage, check_stand_ins
from ..requests.sparse import Sparse
from .methods import DENSE, build_method, labels, name_of

if TYPE_CHECKING:
    import torch

    from ...attention.layout import VideoLayout
    from ...attention.methods.base import Method

    Trained = Callable[[], Method | None]
    TrainedSettings = Callable[[], dict[str, Any] | None]


def methods_of_runs(
    runs: Sequence[str | Method],
    sparse: Sparse,
    layout: VideoLayout,
    device: torch.device,
    sla: Trained,
    vsa: TrainedSettings,
    preset_method: Method | None,
) -> tuple[dict[str, Method | None], dict[str, str]]:
    """The methods of the runs by their labels; and of a default choice those that cannot do this video, with why.

    Args:
        preset_method: that of `runs` whose settings are a preset's, before which those of the request go.
        sla, vsa: see `_as_named`.
    """
    from ...attention.methods.base import OutOfReach

    names, alone = [name_of(run) for run in runs], len(runs) == 1
    unknown = [name for name in sparse.overrides if name not in names]
    if unknown:
        value = f"{unknown[0]}.{next(iter(sparse.overrides[unknown[0]]), '')}"
        raise BadInput("settings", f"this method is not among those to run ({', '.join(names)})", value=value)
    found: dict[Method | None, None] = {}  # an ordered set: a config that is given twice, once by its name, is one run
    left_out: dict[str, str] = {}
    for run in runs:
        if run == DENSE:
            found[None] = None
            continue
        try:
            if isinstance(run, str):
                method = _as_named(run, sparse, layout, sla, vsa)
            elif run is preset_method:
                method = _of_preset(run, sparse, layout)
            else:
                method = as_given(run, sparse, layout)
            check_stand_ins(sparse.backend, device, method)
            check_second_stage(sparse.backend, device, method)
        except BadInput as error:
            # Left out of several alone that were chosen here, and of which this one was not meant in particular; where
            # one was, the video is dense if nothing at all was asked of sparse attention.
            of_video = isinstance(error.__cause__, OutOfReach) and not any(sparse.given().values())
            if sparse.methods or name_of(run) in sparse.overrides or (alone and not of_video):
                raise
            left_out[name_of(run)] = error.problem
            if alone:
                found[None] = None
        else:
            found[method] = None
    if not any(found) and left_out and not alone:
        name, reason = next(iter(left_out.items()))
        raise BadInput("method", f"none of {', '.join(left_out)} can make this video ({name}: {reason})")
    named = iter(labels([method for method in found if method is not None]))
    return {DENSE if method is None else next(named): method for method in found}, left_out


def _as_named(name: str, sparse: Sparse, layout: VideoLayout, sla: Trained, vsa: TrainedSettings) -> Method:
    """A method by its name, with what is asked for; `sla` and `vsa` are asked for what a model was trained for."""
    if name == "sla" and (method := sla()) is not None:
        return method
    overrides, learned = dict(sparse.overrides.get(name, {})), vsa() if name == "vsa" else None
    for setting, value in (learned or {}).items():
        if setting != "density" or sparse.density is None:
            overrides.setdefault(setting, value)
    method = build_method(name, layout, **_amounts(sparse), overrides=overrides)
    if method.needs_weights and learned is None:
        fixes = {
            "sla": f"Train it with vidaccel adapt sla, or give an adapter as {mention('sla')}; without training there "
            "is sla.linear_scope=none.",
            "vsa": "Take one that was, such as FastWan (vidaccel convert fastwan); without training there is "
            "vsa.gated=false.",
        }
        raise BadInput("method", "this model was not trained for it", fixes[name], value=name)
    return method


def _amounts(sparse: Sparse) -> dict[str, Any]:
    return {"density": sparse.density, "dense_steps": sparse.dense_steps, "dense_layers": sparse.dense_layers}


def _of_preset(method: Method, sparse: Sparse, layout: VideoLayout) -> Method:
    """The config of a preset, with what is asked for in the place of its own settings."""
    from ...attention import METHODS

    amounts, overrides = _amounts(sparse), sparse.overrides.get(method.name, {})
    asked = bool(overrides) or any(value is not None for value in amounts.values())
    # What a model was trained for, and a config of one's own, are taken as they are.
    if not asked or method.needs_weights or type(method) is not METHODS.get(method.name):
        return as_given(method, sparse, layout)
    try:
        return build_method(method.name, layout, **amounts, overrides=overrides, base=method)
    except BadInput as error:
        if error.field != "method":
            raise
        given = [name for name, value in {**amounts, "settings": overrides or None}.items() if value is not None]
        problem = f"cannot be used with {method.name}, the method of {mention('preset')}: {error.problem}"
        raise BadInput(given, problem) from error.__cause__


def as_given(method: Method, sparse: Sparse, layout: VideoLayout) -> Method:
    """A config, which has all its settings already.

    Raises:
        BadInput: it cannot do this video, or the request has settings beside it.
    """
    of_methods = ("density", "dense_steps", "dense_layers", "settings")
    given = {name: is_given for name, is_given in sparse.given().items() if name in of_methods}
    refuse_given(
        given, f"for a method's name, and {type(method).__name__} came with its settings", "Set its own fields"
    )
    try:
        method.check(layout)
    except ValueError as error:
        raise BadInput("method", str(error).rstrip("."), value=method.name) from error
    return method
