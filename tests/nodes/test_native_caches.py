"""What tells passes of a native model apart, without ComfyUI."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vidaccel.nodes.native.caches import asked_of


def asked(level: float, **entry) -> str:
    return asked_of(None, [{"uuid": "p", **entry}], torch.tensor([level]), {})


@pytest.mark.parametrize("bound", [0.6, 0.7, 0.1])
def test_bounds_are_compared_in_the_precision_of_the_level(bound):
    """As ComfyUI compares them: 0.6 is 0.60000002 in float32, which is not above 0.6."""
    assert asked(bound, timestep_start=bound) == asked(bound, timestep_end=bound) == asked(bound)
    net = SimpleNamespace(timestep_range=(1.0, bound), previous_controlnet=None)
    assert asked(bound, control=net) == asked(0.9, control=net) != asked(bound - 0.01, control=net)
    assert asked(0.9, timestep_start=bound) != asked(0.9) == asked(0.9, timestep_end=bound)


def test_each_control_net_of_a_chain_comes_and_goes_by_itself():
    first = SimpleNamespace(timestep_range=(1.0, 0.5), previous_controlnet=None)
    last = SimpleNamespace(timestep_range=(0.8, 0.2), previous_controlnet=first)
    levels = [0.9, 0.6, 0.3, 0.1]
    assert len({asked(level, control=last) for level in levels}) == len(levels)


def test_a_pass_without_a_part_of_its_prompt_is_another():
    """LTX-2's Reference Audio makes one without the reference, of the same id."""
    whole = {"model_conds": {"c_crossattn": 1, "ref_audio": 2}}
    assert asked(0.5, **whole) == asked(0.4, **whole) != asked(0.5, model_conds={"c_crossattn": 1})
    passes = [asked_of(None, [{"uuid": "p"}], torch.tensor([0.5]), {}, beside) for beside in ("", "blocks 29")]
    assert passes[0] != passes[1]
