"""What sparse attention in a native model refuses, in the words of its node, without ComfyUI."""

from __future__ import annotations

import pytest
import torch
from native_calls import RECORDED, Executor, session_of, step

from vidaccel import SVG, SVG2, Radial, Sparge, Tangent
from vidaccel.nodes.report.wording import said_by


@pytest.mark.parametrize(
    ("method", "name", "said"),
    [
        (
            SVG(density=0.01),
            "wan",
            "density is 0.01, and with a video of 5 frames of 4x4 it must be at least 0.11. Raise it.",
        ),
        (
            lambda layout: Radial.for_density(layout, 0.01),
            "hunyuan",
            r"density is 0.01, and with a video of 5 frames of 4x4 with 7 tokens of text or references it must be at "
            r"least 0.\d+. Raise it.",
        ),
        (
            SVG2(density=0.1, compensate=True),
            "wan",
            "density is 0.1, and with a video of 5 frames of 4x4 it must be at least 0.21. Raise it, switch "
            "compensate off, or take fewer key_clusters.",
        ),
        (
            Tangent(density=0.1),
            "wan",
            "density is 0.1, and with a video of 5 frames of 4x4 it must be at least 0.21. Raise it, or take fewer "
            "key_clusters.",
        ),
        (
            lambda layout: Sparge.for_density(layout, 0.1),
            "wan",
            "density is 0.1, and with a video of 5 frames of 4x4 it must be at least 0.51. Raise it.",
        ),
        (SVG2(density=0.1), "hunyuan", "density is 0.1, .* it must be at least 0.21. Raise it."),
        (
            SVG2(density=0.5, q_clusters=81),
            "wan",
            "query_clusters is 81, and with a video of 5 frames of 4x4 it must be at most 80. Lower it.",
        ),
    ],
)
def test_what_a_method_cannot_do_is_said_in_the_words_of_its_node_before_the_model_works(method, name, said):
    executor = Executor(RECORDED[name])
    with pytest.raises(ValueError, match=rf"^Sparse Attention \(test\): {said}$"):
        step(session_of(method), executor)
    assert not executor.inputs


def test_the_bound_that_is_said_can_be_followed():
    """And what lies more than one step of the input below it cannot."""
    for make in (
        lambda d: SVG(density=d),
        lambda d: SVG2(density=d, compensate=True),
        lambda d: Tangent(density=d),
    ):
        with pytest.raises(ValueError, match="at least") as refused:
            step(session_of(make(0.01)), Executor(RECORDED["wan"]))
        least = float(str(refused.value).partition("at least ")[2].split(". ")[0])
        step(session_of(make(least)), Executor(RECORDED["wan"]))
        with pytest.raises(ValueError, match="at least"):
            step(session_of(make(least - 0.011)), Executor(RECORDED["wan"]))


def test_what_fails_in_a_call_is_said_with_the_name_of_the_node():
    class Broken(Executor):
        def _tensor(self, tokens, number):
            return super()._tensor(tokens, number) * float("nan")

    with pytest.raises(ValueError, match=r"^Sparse Attention \(test\): .* values of q are NaN or infinite in layer 0"):
        step(session_of(), Broken(RECORDED["wan"]))
    with pytest.raises(RuntimeError, match=r"^Sparse Attention \(test\): backend 'flex' cannot run this call: it"):
        step(session_of(SVG2(density=0.6, compensate=True), backend="flex"), Executor(RECORDED["wan"]))


def test_an_error_of_another_class_keeps_its_class():
    """ComfyUI frees memory and shows a help text for one, by its class."""
    with pytest.raises(torch.OutOfMemoryError, match="^all gone$"), said_by("Sparse Attention"):
        raise torch.OutOfMemoryError("all gone")


@pytest.mark.parametrize(
    ("options", "message"), [({"min_tokens": -1}, "min_tokens is -1"), ({"backend": "cudnn"}, "unknown backend")]
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        session_of(**options)
