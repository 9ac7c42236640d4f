"""Errors that name a field, each front end's word for it, and their way through a worker process."""

from __future__ import annotations

import pickle

import pytest

from vidaccel.cli.errors import option
from vidaccel.generation.errors import BadInput, mention, refuse_given, worded


def test_one_fault_in_the_words_of_each_front_end():
    error = BadInput("guidance_scale", f"with {mention('steps')} 4 it must be 1", "Give 1.", value=3.0)
    assert (error.field, error.value) == ("guidance_scale", 3.0)
    assert str(error) == "guidance_scale is 3.0: with steps 4 it must be 1. Give 1."
    assert error.worded(option) == "--guidance-scale is 3.0: with --steps 4 it must be 1. Give 1."
    assert error.worded(str.upper) == "GUIDANCE_SCALE is 3.0: with STEPS 4 it must be 1. Give 1."


def test_a_value_is_not_read_as_a_field():
    """Braces and percent signs of a file's name are not the format's."""
    assert str(BadInput("image", "there is no such file", value="{steps} %s.png")) == (
        "image is {steps} %s.png: there is no such file."
    )


def test_without_a_value():
    assert str(BadInput("prompt", "is empty", "Say what the video shows.")) == (
        "prompt is empty. Say what the video shows."
    )


def test_it_survives_a_pickle():
    error = pickle.loads(pickle.dumps(BadInput("seed", "it must be positive", value=-1)))
    assert isinstance(error, BadInput)
    assert (error.field, error.value, str(error)) == ("seed", -1, "seed is -1: it must be positive.")
    assert error.worded(option).startswith("--seed is -1")


def test_fields_without_effect_are_named_together():
    refuse_given({"density": False}, "of no use")
    with pytest.raises(BadInput, match=r"^density is of no use\. Leave it out\.$"):
        refuse_given({"density": True, "backend": False}, "of no use")
    with pytest.raises(BadInput, match=r"^density, backend are of no use\. Add more, or leave them out\.$") as caught:
        refuse_given({"density": True, "backend": True}, "of no use", "Add more")
    assert caught.value.worded(option).startswith("--density, --backend are")


def test_a_text_of_a_report():
    assert worded(f"what {mention('compare')} takes", option) == "what --compare takes"
    assert worded(f"what {mention('compare')} takes") == "what compare takes"
