"""What tells a pass from the others at its noise level."""

from __future__ import annotations

import torch

from vidaccel.nodes.native.passes import Passes

MAIN = {
    "sample_sigmas": torch.tensor([1.0, 0.5, 0.0]),
    "cond_or_uncond": [1, 0],
    "uuids": ["n", "p"],
    "wrappers": {"a": {None: [print]}},
}
STG = {**MAIN, "cond_or_uncond": [0], "uuids": ["p"], "stg_self_attn_blocks": frozenset({29, 3})}
MODALITY = {**MAIN, "cond_or_uncond": [0], "uuids": ["p"], "a2v_cross_attn": False, "v2a_cross_attn": False}


def test_further_passes_at_a_level_are_told_by_their_options():
    passes = Passes()
    assert passes.beside(MAIN, 1.0) == ""
    assert passes.beside(STG, 1.0) == "stg_self_attn_blocks 3 29"
    assert passes.beside(MODALITY, 1.0) == "a2v_cross_attn off, v2a_cross_attn off"
    assert passes.beside({**MAIN, "context_window": object(), "sigmas": torch.ones(2)}, 1.0) == ""
    assert passes.beside({name: MAIN[name] for name in MAIN if name != "wrappers"}, 1.0) == "no wrappers"
    assert passes.beside({**MAIN, "patches": {"attn1_patch": [print]}}, 1.0).startswith("patches attn1_patch ")


def test_what_all_passes_of_a_level_have_tells_nothing():
    """A node may count steps in the options; and the objects in them may be others on each GPU."""
    passes = Passes()
    for step, sigma in enumerate((1.0, 0.5)):
        for _ in range(2):
            assert passes.beside({**MAIN, "step": step, "wrappers": {"a": {None: [id]}}}, sigma) == ""


def test_a_fraction_that_changes_from_level_to_level_makes_no_other_pass():
    """A strength that falls with the noise; two passes that differ in it alone are two."""
    passes = Passes()
    for sigma in (1.0, 0.7, 0.4):
        falls, halves = (
            {**MAIN, "guidance": {"strength": sigma / n, "blocks": [3, 4], "at": (0.1 * sigma,)}} for n in (1, 2)
        )
        assert passes.beside({**MAIN, "scale": 1.0}, sigma) == ""
        for _ in range(2):
            assert passes.beside({**MAIN, "scale": sigma / 2}, sigma) == "scale"
            assert passes.beside({**falls, "scale": 1.0}, sigma) == "guidance at blocks 3 4 strength"
            assert passes.beside({**halves, "scale": 1.0}, sigma) == "guidance at blocks 3 4 strength #2"
        assert passes.beside({**MAIN, "scale": 1.0}, sigma) == ""


def test_blocks_that_are_replaced_have_names_of_their_own():
    passes = Passes()
    assert passes.beside(MAIN, 1.0) == ""
    assert passes.beside({**MAIN, "patches_replace": {"dit": {("double_block", 1): print}}}, 1.0) == ""
    assert passes.beside({**MAIN, "patches_replace": {"attn1": {("middle", 0): print}}}, 1.0) != ""


def test_a_prompt_is_given_less_than_before():
    """LTX-2's Reference Audio takes the reference out, and a negative prompt need never have had it."""
    passes = Passes()
    positive, negative = {**MAIN, "uuids": ["p"]}, {**MAIN, "uuids": ["n"]}
    assert passes.beside(positive, 1.0, ["ref_audio", "frame_rate"]) == ""
    assert passes.beside(negative, 1.0, ["frame_rate"]) == ""
    assert passes.beside(positive, 1.0, ["frame_rate"]) == "no ref_audio"
    assert passes.beside(positive, 1.0, ["ref_audio", "frame_rate", "extra"]) == "with extra"
