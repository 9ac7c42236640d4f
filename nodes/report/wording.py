"""What the engine and the methods say, in the words of a node: its own inputs, and a video as a user counts it."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch

from ...attention import VideoLayout
from ...attention.backends import special_refusal, with_stand_ins
from ...attention.call_checks import NotFinite
from ...attention.methods.base import OutOfReach, either
from ...generation.errors import BadInput, worded

# A field of a method -> the input of the nodes that sets it. What is not here, no node sets.
INPUTS = {
    "density": "density",
    "compensate": "compensate",
    "tolerance": "tolerance",
    "q_clusters": "query_clusters",
    "k_clusters": "key_clusters",
}
# What to do with an input that moves a bound.
_EASING = {"compensate": "switch compensate off", "key_clusters": "take fewer key_clusters"}
STEP = 0.01  # of the inputs that are shares
PRECISIONS = ["of the model", "int8"]  # of the input of that name

# A field of a request, of which there are several front ends -> the input that sets it.
_FIELDS = {
    "model": "pipeline",
    "guidance_scale": "guidance",
    "guidance_free": "adapter",
    "out": "name",
    "levers": "sparse, caches, adapters, guidance_cache, compiled_blocks",
}


class InputError(ValueError):
    """An input that cannot be, in the words of a node."""


@contextmanager
def plain_messages(**inputs: str) -> Iterator[None]:
    """Name the fields of a request as the inputs of the nodes are named; those of `inputs` as that says."""
    try:
        yield
    except BadInput as error:
        raise InputError(error.worded(lambda field: inputs.get(field) or _input_of(field))) from error


def plain(note: str) -> str:
    """A note of a run, likewise."""
    return worded(note, _input_of)


def _input_of(field: str) -> str:
    return _FIELDS.get(field, field)


@contextmanager
def said_of_inputs(kind: str, **inputs: str) -> Iterator[None]:
    """What is wrong with settings of a class that is made of inputs, which a link may have given.

    Args:
        kind: the class. inputs: its fields that the node calls otherwise.
    """
    try:
        yield
    except ValueError as error:
        text = re.sub(rf"\b{kind}\.(\w+)", lambda match: inputs.get(match[1], match[1]), str(error))
        raise InputError(text) from error


def video_words(layout: VideoLayout) -> str:
    """ "9 frames of 4x8": latent frames, and rows and columns of tokens; tokens of text and references after that."""
    text = f"{layout.frames} frame{'s' * (layout.frames != 1)} of {layout.height}x{layout.width}"
    return text if not layout.text_tokens else f"{text} with {layout.text_tokens} tokens of text or references"


def limit_words(error: OutOfReach, layout: VideoLayout, inputs: Collection[str]) -> str:
    """What a method cannot do with a video, and which of the node's inputs to change."""
    name = INPUTS.get(error.field, error.field)
    whole = isinstance(error.value, int) and not isinstance(error.value, bool)
    least = error.least if error.least is None or whole else min(1.0, (math.floor(error.least / STEP) + 1) * STEP)
    most = error.most if error.most is None or whole else min(1.0, (math.ceil(error.most / STEP) - 1) * STEP)
    too_low = least is not None and error.value < least
    bound, verb = (f"at least {least:g}", "Raise") if too_low else (f"at most {most:g}", "Lower")
    easing = [INPUTS.get(field) for field in error.eased_by]
    ways = [f"{verb} it", *(_EASING[easier] for easier in easing if easier in _EASING and easier in inputs)]
    return f"{name} is {error.value:g}, and with a video of {video_words(layout)} it must be {bound}. {either(ways)}."


@contextmanager
def said_by(node: str) -> Iterator[None]:
    """Put the name of a node before an error: a sampler, in which it is raised, shows nothing but the message.

    Errors of other classes pass as they are: ComfyUI knows running out of memory and interruptions by their class.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if type(error) not in (ValueError, RuntimeError, NotFinite):
            raise
        raise type(error)(f"{node}: {error}") from error


def check_shares(start: float, end: float, instead: str) -> None:
    """Raise a `ValueError` for shares of the sampling, to stay dense, that are none or leave nothing sparse.

    Args:
        start, end: the inputs dense_start_percent and dense_end_percent.
        instead: what to connect for a dense video.
    """
    for name, value in (("dense_start_percent", start), ("dense_end_percent", end)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}: it is a share and lies between 0 and 1.")
    if start + end >= 1:
        raise ValueError(
            f"dense_start_percent {start:g} and dense_end_percent {end:g} leave no step sparse: together they must "
            f"stay below 1. {instead}"
        )


def chosen_precision(choice: str) -> str | None:
    """What an input `precision` means to `accelerate`; a `ValueError` for what is none of its options."""
    if choice not in PRECISIONS:
        raise ValueError(f"precision is {choice!r}: choose {' or '.join(PRECISIONS)}.")
    return None if choice == PRECISIONS[0] else choice


def check_precision(backend: str, device: torch.device, choice: str) -> None:
    """Raise a `ValueError` where nothing on a device computes attention in a precision, or a named backend does not."""
    reason = special_refusal(backend, device, chosen_precision(choice))
    if reason is not None:
        raise ValueError(f"precision is {choice}: {reason.rstrip('.')}. Choose {PRECISIONS[0]}.")


def check_stand_ins(backend: str, device: torch.device, of: str) -> None:
    """Raise a `ValueError` where a backend that was chosen by name cannot compute what stands for skipped keys.

    Args:
        backend, device: what is to compute, and where.
        of: what has them, "compensate" or a method; empty for nothing.
    """
    able = with_stand_ins(device)
    if of and backend not in ("auto", *able):
        raise ValueError(
            f"backend is {backend}: it cannot compute {of} on {device.type}. Choose auto or {' or '.join(able)}, or "
            f"{_EASING.get(of, 'another method')}."
        )
