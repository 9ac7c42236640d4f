"""SLA in ComfyUI, without ComfyUI: adapters against native models, and pipelines with and without adapters."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sla_models import write_adapter, write_model

import vidaccel
from vidaccel.generation.requests.settings import Settings
from vidaccel.nodes.native.sla import LearnedSLA, matrices_and_projections, open_adapter
from vidaccel.nodes.pipeline.generating import generate
from vidaccel.nodes.pipeline.pipelines import load
from vidaccel.nodes.pipeline.residency import Residency
from vidaccel.nodes.report.tables import report_text
from vidaccel.nodes.report.wording import InputError


def native(name: str = "WanModel", layers: int = 6, dim: int = 192, heads: int = 3):
    """What is asked of ComfyUI's module: class, layers, width and heads."""
    return type(name, (SimpleNamespace,), {})(blocks=[None] * layers, dim=dim, num_heads=heads)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("adapter"), vidaccel.demo.path())


def test_what_a_native_model_gets(adapter):
    lora, projections = matrices_and_projections(open_adapter(adapter), native())
    assert len(lora) == 12 and all(name.startswith("diffusion_model.blocks.") for name in lora)
    assert sorted(projections) == list(range(6))
    assert {tuple(p["weight"].shape) for p in projections.values()} == {(64, 64)}
    assert {tuple(p["bias"].shape) for p in projections.values()} == {(64,)}


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (native("HunyuanVideo"), "model is a HunyuanVideo: .* is for Wan 2.1 or 2.2"),
        (native(layers=7), "lacks 2 tensors of SLA, such as blocks.6.attn1.proj_l.bias"),
        (native(layers=4), "has 6 layers of 64 channels a head, and this model 4 of 64"),
        (native(heads=6), "has 6 layers of 64 channels a head, and this model 6 of 32"),
    ],
)
def test_native_models_that_it_does_not_fit(adapter, model, words):
    with pytest.raises(InputError, match=words):
        matrices_and_projections(open_adapter(adapter), model)


def test_adapters_that_cannot_be(tmp_path):
    with pytest.raises(InputError, match="sla: .*gone is no adapter that can be read"):
        open_adapter(tmp_path / "gone")
    with pytest.raises(InputError, match="sla: .*an adapter of the recipe gft: give one that the recipe sla made"):
        open_adapter(write_adapter(tmp_path, vidaccel.demo.path(), recipe="gft"))


SETTINGS = Settings("a red circle", frames=5, height=64, width=64, steps=2, seed=1)


def pipeline(model: str):
    return load(model, "auto", Residency(torch.device("cpu"), lambda part, memory: None))


def video(loaded):
    return generate(loaded, SETTINGS, on_step=lambda step, steps, latents: None)


def test_a_pipeline_with_an_adapter(adapter):
    loaded = pipeline("demo")
    before = {name: value.clone() for name, value in loaded.pipe.transformer.state_dict().items()}
    acceleration = LearnedSLA(facts=loaded.facts, learned=(open_adapter(adapter),), backend="masked")
    made = video(loaded.accelerated(acceleration))
    text = report_text(made.report.news())
    assert text.startswith("sla: sla transformer.safetensors, topk 0.3, block (8, 8), linear_scope all, backend masked")
    assert "0.250" in text
    assert not torch.equal(made.frames, video(loaded).frames)
    after = loaded.pipe.transformer.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_a_pipeline_that_was_trained_and_one_that_was_not(tmp_path):
    folder = write_model(tmp_path / "model", vidaccel.demo.path())
    loaded = pipeline(str(folder))
    made = video(loaded.accelerated(LearnedSLA(facts=loaded.facts)))
    assert "sla: topk 0.3" in report_text(made.report.news())
    short = video(loaded.accelerated(LearnedSLA(facts=loaded.facts, min_tokens=1000)))
    assert "No call was sparse: min_tokens 1000" in report_text(short.report.news())
    plain = pipeline("demo")
    with pytest.raises(InputError, match="pipeline was not trained for SLA"):
        video(plain.accelerated(LearnedSLA(facts=plain.facts)))
    other = open_adapter(write_adapter(tmp_path, vidaccel.demo.path(), base_hash="0123"))
    with pytest.raises(InputError, match="sla transformer.safetensors was trained on .*, and this model is another"):
        video(plain.accelerated(LearnedSLA(facts=plain.facts, learned=(other,))))
