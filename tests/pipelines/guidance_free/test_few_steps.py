"""Adapters that make few steps, too: their noise levels in the pipeline, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from gft_adapters import write_adapter
from gft_calls import loaded, made, saved
from tiny_wan import make_transformer

import vidaccel
from vidaccel import Preset
from vidaccel.pipelines.guidance_free import GuidanceFreeError
from vidaccel.pipelines.presets import PresetError, SchedulerChoice

SIGMAS = (1.0, 0.9, 0.75, 0.5)
FEW = {
    "recipe": "consistency",
    "guidance_free": {"min_scale": 2.0, "max_scale": 3.0, "gated": False},
    "few_steps": {"sigmas": SIGMAS, "objective": "segments", "teacher_steps": 4},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"), base, make_transformer(), **FEW)


@pytest.fixture
def pipe(base) -> WanPipeline:
    return loaded(base)


def test_its_steps(pipe, adapter):
    """One pass at each of its levels; the scheduler is the pipeline's own again afterwards."""
    seen, own = [], pipe.scheduler
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: seen.append(float(given["timestep"][0])), with_kwargs=True
    )
    before = made(pipe, 2.0)
    seen.clear()
    with vidaccel.guidance_free(pipe, adapter) as handle:
        made(pipe, 2.0, 4)
        assert seen == pytest.approx([1000 * sigma for sigma in SIGMAS])
        assert handle.sigmas == SIGMAS
    assert pipe.scheduler is own and torch.equal(made(pipe, 2.0), before)


def test_a_scheduler_that_was_set_meanwhile_stays(pipe, adapter):
    handle = vidaccel.guidance_free(pipe, adapter)
    other = pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    handle.remove()
    assert pipe.scheduler is other


def test_a_preset_with_a_scheduler_is_refused_in_either_order(pipe, adapter):
    """Each would put its own scheduler back over the other's."""
    own, preset = pipe.scheduler, Preset(name="p", scheduler=SchedulerChoice("UniPCMultistepScheduler"))
    with vidaccel.guidance_free(pipe, adapter):
        with pytest.raises(PresetError, match="guidance-free by an adapter that was distilled to noise levels of its"):
            vidaccel.apply(pipe, preset)
        vidaccel.apply(pipe, Preset(name="none")).remove()
    with (
        vidaccel.apply(pipe, preset),
        pytest.raises(GuidanceFreeError, match="a preset with a scheduler is at work, p: call remove"),
    ):
        vidaccel.guidance_free(pipe, adapter)
    assert pipe.scheduler is own and torch.isfinite(made(pipe, 2.0)).all()


def test_what_is_saved_is_the_pipeline_itself(tmp_path, pipe, adapter):
    own = type(pipe.scheduler).__name__
    with vidaccel.guidance_free(pipe, adapter):
        pipe.save_pretrained(tmp_path)
        made(pipe, 2.0, 4)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"][1] == own


def test_with_sparse_attention(pipe, adapter):
    method = vidaccel.Radial(schedule=vidaccel.DenseSchedule(first_steps=1))
    with vidaccel.guidance_free(pipe, adapter), vidaccel.accelerate(pipe, method) as handle:
        made(pipe, 2.0, 4)
        assert {record.step for record in handle.report().records} == {0, 1, 2, 3}


def test_calls_that_it_cannot_do(pipe, adapter):
    with vidaccel.guidance_free(pipe, adapter):
        with pytest.raises(ValueError, match="num_inference_steps is 20, but the model was distilled to 4: give that"):
            made(pipe, 2.0, 20)
        with pytest.raises(GuidanceFreeError, match="guidance_scale is 1: .* was trained from 2 up. Give at least"):
            made(pipe, 1.0, 4)
        with pytest.raises(GuidanceFreeError, match="guidance_scale is 4: .* was trained up to 3"):
            made(pipe, 4.0, 4)


def test_adapters_of_other_steps(tmp_path):
    folder = saved(tmp_path / "two", transformer_2=make_transformer(1), boundary_ratio=0.9)
    pipe = loaded(folder)
    files = [
        write_adapter(tmp_path, folder, pipe.transformer, **FEW),
        write_adapter(tmp_path, folder, pipe.transformer_2, "transformer_2"),
    ]
    with pytest.raises(GuidanceFreeError, match=r"safetensors \(4 steps\) and .* were trained for other steps"):
        vidaccel.guidance_free(pipe, files)
    assert type(pipe.scheduler).__name__ != "GridScheduler"


def test_a_header_without_its_steps(tmp_path, base, pipe):
    header = {name: value for name, value in FEW.items() if name != "few_steps"}
    with pytest.raises(GuidanceFreeError, match="its header lacks 'few_steps'"):
        vidaccel.guidance_free(pipe, write_adapter(tmp_path, base, make_transformer(), **header))


def test_a_pipeline_that_shares_the_transformer_needs_steps_of_its_own(pipe, adapter):
    """It makes its passes without the adapter that the levels are of."""
    with vidaccel.guidance_free(pipe, adapter):
        other = WanPipeline.from_pipe(pipe)
        with pytest.raises(GuidanceFreeError, match="4 steps its scheduler is: give it a scheduler of its own"):
            made(other, 2.0, steps=4)
