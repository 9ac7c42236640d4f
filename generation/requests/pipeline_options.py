"""Further arguments of a pipeline's call: which it has, of what type, and what it refuses when it is called."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from ..errors import BadInput, mention
from ..rows import PipelineRow

_OWN = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "num_frames": "frames",
    "height": "height",
    "width": "width",
    "num_inference_steps": "steps",
    "generator": "seed",
}
"""Argument of pipelines -> the field of the request that decides it."""
_SEVERAL = ("num_videos_per_prompt", "num_images_per_prompt")
_SET_HERE = {
    **dict.fromkeys(("output_type", "return_dict"), "a run makes frames, which are written to the file of the run"),
    **dict.fromkeys(
        ("callback_on_step_end", "callback_on_step_end_tensor_inputs"), "a run has its own, which counts the steps"
    ),
}
_NOT_OPTIONS = (*_SEVERAL, *_SET_HERE)
_JUDGES = ("diffusers.pipelines.", "diffusers.schedulers.")
"""Modules that refuse what they are called with; what models raise is another matter."""
_PLAIN = (bool, int, float, str, list, tuple, dict, NoneType)


def check_options(options: Mapping[str, Any], row: PipelineRow) -> None:
    """Raise BadInput for arguments that the pipeline lacks, that other fields decide, or of another type than it takes.

    Args:
        options: by the names that the call of the pipeline has.
        row: of the pipeline.
    """
    from ...pipelines.loading import call_arguments, call_defaults, call_types

    if not options:
        return
    own = {**_OWN, row.guidance: "guidance_scale", row.rate: "fps", row.strength: "strength"}
    own |= dict.fromkeys(row.steps(row.least_steps), "steps") | {name: field for field, name in row.takes.items()}
    known = [name for name in call_arguments(row.pipeline) if name not in (*_NOT_OPTIONS, *own)]
    types, defaults = call_types(row.pipeline), call_defaults(row.pipeline)
    for name, value in options.items():
        told = f"{name}={value!r}"
        if name in own and name:
            raise BadInput("pipeline_options", f"{mention(own[name])} decides it", "Give that.", value=told)
        if name in _SEVERAL:
            raise BadInput(
                "pipeline_options", "a run makes one video", f"Run it again with another {mention('seed')}.", value=told
            )
        if name in _SET_HERE:
            raise BadInput("pipeline_options", _SET_HERE[name], "Leave it out.", value=told)
        if name in row.no_options and value != defaults[name]:
            raise BadInput("pipeline_options", f"is of no use: {row.no_options[name]}", "Leave it out.", value=told)
        if name not in known:
            problem = f"{row.pipeline} has no such argument; it has {', '.join(known)}"
            raise BadInput("pipeline_options", problem, value=told)
        is_default = value is None and defaults.get(name, ...) is None
        if not is_default and not admits(types.get(name, Any), value):
            raise BadInput("pipeline_options", f"{row.pipeline} takes {_words(types[name])} there", value=told)
        if name == "max_sequence_length" and value < 1:
            raise BadInput("pipeline_options", "it must be at least 1", value=told)


@contextlib.contextmanager
def refusals(options: Mapping[str, Any]) -> Iterator[None]:
    """What a pipeline says of options that it refuses when it is called becomes a BadInput."""
    from ...pipelines.errors import first_line

    try:
        yield
    except (TypeError, ValueError) as error:
        if not options or not _raised_in(error).startswith(_JUDGES):
            raise
        told = ", ".join(f"{name}={value!r}" for name, value in options.items())
        problem = f"the pipeline refuses it: {first_line(error).rstrip('.')}"
        raise BadInput("pipeline_options", problem, value=told) from error


def _raised_in(error: BaseException) -> str:
    """The module whose code raised an error."""
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals["__name__"])


def admits(hint: Any, value: Any) -> bool:
    """Whether an argument with this type hint may have a value, of which plain ones alone are judged.

    Whole numbers are numbers, tuples are lists; tensors, arrays and other objects are the pipeline's matter.
    """
    if hint is Any or not isinstance(value, _PLAIN):
        return True
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(admits(each, value) for each in inner)
    if origin is Literal:
        return value in inner
    if isinstance(hint, type) and issubclass(hint, Enum):
        return value in [member.value for member in hint]
    kind = origin or hint
    if kind in (list, Iterable):
        return isinstance(value, list | tuple) and all(admits(inner[0], each) for each in value if inner)
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float)
    return isinstance(kind, type) and isinstance(value, kind)


def _words(hint: Any) -> str:
    """A type hint as it is read."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " or ".join(repr(member.value) for member in hint)
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
