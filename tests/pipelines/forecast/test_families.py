"""In every family's pipelines: latents, noise levels and signs are read as the pipeline's own scheduler has them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import cogvideo
from fast_set import fast
from no_torchvision import without_torchvision
from torch.utils._pytree import tree_map

import vidaccel
from vidaccel import Preset
from vidaccel.pipelines import find_transformers
from vidaccel.pipelines.presets import Cache, PresetError

sys.path.insert(0, str(Path(__file__).parents[1] / "acceleration"))
from test_family_pipelines import CASES, built, latents

LEFT = {
    "SkyReelsV2DiffusionForcingPipeline": "the best one for",  # each frame is stepped by a scheduler of its own
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": "frames have noise levels of their own",
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": "frames have noise levels of their own",
    "HeliosPyramidPipeline": "",  # of a few steps for each size, all are the first ones
    "LTXConditionPipeline": "the best one for",  # the conditions get new noise at each step
    "LTX2Pipeline": "the best one for",  # see the last test
    "LTX2ImageToVideoPipeline": "the best one for",
    "LTX2ConditionPipeline": "the best one for",
    "CosmosTextToWorldPipeline": "EDMEulerScheduler does not tell",
    "CosmosVideoToWorldPipeline": "EDMEulerScheduler does not tell",
    "Cosmos2VideoToWorldPipeline": "does not tell how much noise",
    "Cosmos3OmniPipeline": "does not say which of its inputs are the latents",
}
"""Pipelines in which a steady model is not forecast to the last digit, and what is told."""
# With a pass for each branch and with conditions behind the latents, of diffusion, packed, and with signs turned.
FAST = [
    next(case for case in CASES if case.runs == name)
    for name in ("WanPipeline", "HunyuanVideo15Pipeline", "CogVideoXPipeline", "LTXPipeline", "MochiPipeline")
]
SOME_LEFT = [next(case for case in CASES if case.runs == name) for name in ("LTX2Pipeline", "Cosmos3OmniPipeline")]


@pytest.fixture(autouse=True)
def _without_packages(monkeypatch):
    without_torchvision(monkeypatch)
    cogvideo.without_opencv(monkeypatch)


def steady(module: torch.nn.Module) -> Any:
    """A forward pass that makes the same random numbers whenever it is asked for the same shapes.

    A flow at a steady velocity is a straight line, on which the noise that is seen does not change; so does DDIM's way
    with a steady noise. With a wrong level, sign or part of the input it would.
    """
    forward, known = module.forward, {}

    def made(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)

        def numbers(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            if x.shape not in known:
                known[x.shape] = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
            return known[x.shape].clone()

        return tree_map(numbers, out)

    return made


def steady_pipeline(case: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    pipe = built(case)
    for module, _ in find_transformers(pipe).values():
        monkeypatch.setattr(module, "forward", steady(module))
    return pipe


@pytest.mark.parametrize("case", fast(FAST, [case for case in CASES if case.runs not in LEFT]), ids=str)
def test_a_steady_model_is_forecast_exactly(case, monkeypatch):
    pipe = steady_pipeline(case, monkeypatch)
    steps = {"num_inference_steps": 8 if case.steps[0] == 4 else 16}  # a run at half strength has half of them
    plain = latents(pipe, case, case.sizes[0], **steps)
    with vidaccel.apply(pipe, Preset(cache=Cache("forecast", 1e-4))) as handle:
        made, account = latents(pipe, case, case.sizes[0], **steps), handle.report()
        other = latents(pipe, case, case.sizes[1], **steps)
        again = latents(pipe, case, case.sizes[0], **steps)
    torch.testing.assert_close(made, plain, rtol=1e-4, atol=1e-4)
    computed = [bool(step.computed) for step in account.steps if step.run == 0]
    assert computed[:3] == [True] * 3 and not any(computed[3:6]) and computed[-1]
    assert any("in the last run; what it makes" in note for note in account.notes)
    assert made.equal(again) and other.isfinite().all()
    assert latents(pipe, case, case.sizes[0], **steps).equal(plain)


@pytest.mark.parametrize("case", fast(SOME_LEFT, [case for case in CASES if case.runs in LEFT]), ids=str)
def test_what_cannot_be_forecast_is_told_and_computed(case, monkeypatch):
    pipe = steady_pipeline(case, monkeypatch)
    steps = {} if "Pyramid" in case.runs else {"num_inference_steps": 8}
    try:
        handle = vidaccel.apply(pipe, Preset(cache=Cache("forecast", 1e-4)))
    except PresetError as error:
        assert LEFT[case.runs] in str(error)
        return
    plain = latents(pipe, case, case.sizes[0], **steps)
    account = handle.report()
    handle.remove()
    assert account.counts()["skipped"] == 0 and any(LEFT[case.runs] in note for note in account.notes)
    assert latents(pipe, case, case.sizes[0], **steps).equal(plain)


def test_frames_that_go_their_ways_one_after_another_are_not_forecast():
    """Diffusion forcing has them at one level together, or in groups."""
    case = next(case for case in CASES if case.runs == "SkyReelsV2DiffusionForcingPipeline")
    pipe = built(case)
    with vidaccel.apply(pipe, Preset(cache=Cache("forecast", 1e3))) as handle:
        latents(pipe, case, case.sizes[0], num_inference_steps=8)
        assert handle.report().counts()["skipped"] >= 6
        handle.reset()
        latents(pipe, case, case.sizes[0], num_inference_steps=8, causal_block_size=1, ar_step=2)
        account = handle.report()
    assert account.counts()["skipped"] == 0 and any("noise levels of their own" in note for note in account.notes)


def test_all_runs_of_a_call_are_told():
    """Helios makes its chunks one after another."""
    case = next(case for case in CASES if case.runs == "HeliosPipeline")
    pipe = built(case)
    with vidaccel.apply(pipe, Preset(cache=Cache("forecast", 1e3))) as handle:
        for _ in range(2):
            latents(pipe, case, case.sizes[0], num_inference_steps=8)
        account = handle.report().last()
    left_out = sum(not step.computed for step in account.steps)
    assert account.runs() == [2, 3] and left_out > 4
    (note,) = (note for note in account.notes if "what it makes" in note)
    assert note.startswith(f"forecast: {left_out} steps of the transformer in the 2 runs of the last call; ")


@pytest.mark.parametrize(
    ("name", "cache", "instead"),
    [
        ("Cosmos2VideoToWorldPipeline", "forecast", "another cache,"),  # no other one is for it either
        ("EasyAnimatePipeline", "taylorseer", "another cache, such as forecast,"),
        ("WanAnimatePipeline", "seacache", "another cache, such as forecast,"),
    ],
)
def test_a_cache_that_is_named_in_the_place_of_another_can_be_used(name, cache, instead):
    """By the scheduler too, before the first call of the pipeline as after it."""
    case = next(case for case in CASES if case.runs == name)
    pipe = built(case)
    for _ in range(2):
        with pytest.raises(PresetError) as raised:
            vidaccel.apply(pipe, Preset(cache=cache))
        assert raised.value.fix == f"Take {instead} or leave it out."
        if "such as " in instead:
            vidaccel.apply(pipe, Preset(cache=instead.split("such as ")[1].rstrip(","))).remove()
        latents(pipe, case, case.sizes[0])


def test_the_guidance_of_ltx_2_bends_the_way_a_little(monkeypatch):
    """It rescales what it makes, by the latents."""
    case = next(case for case in CASES if case.runs == "LTX2Pipeline")
    pipe = steady_pipeline(case, monkeypatch)
    plain = latents(pipe, case, case.sizes[0], num_inference_steps=8)
    with vidaccel.apply(pipe, Preset(cache=Cache("forecast", 0.05))) as handle:
        made = latents(pipe, case, case.sizes[0], num_inference_steps=8)
        assert handle.report().counts()["skipped"] >= 6
    assert 0 < (made - plain).norm() < 0.05 * plain.norm()
