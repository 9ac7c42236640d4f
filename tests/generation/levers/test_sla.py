"""SLA in a request: what the model was trained with is taken, and nothing else."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from diffusers import WanPipeline
from sla_models import METHOD, write_adapter, write_model

import vidaccel
from vidaccel import SLA
from vidaccel.generation.errors import BadInput
from vidaccel.generation.job import Sparse, prepare
from vidaccel.generation.requests.settings import Settings
from vidaccel.pipelines.files.run_folder import FILE

SMALL = {"frames": 5, "height": 64, "width": 64, "steps": 2, "progress": False}  # 32 tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("sla") / "model", vidaccel.demo.path(), tokens=[32])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("adapter"), vidaccel.demo.path())


def test_the_settings_of_the_training_are_taken(model):
    made = vidaccel.generate(model, "a red circle", method="sla", **SMALL)
    config, records = made.report.config, made.report.records
    assert (config["topk"], config["block"]) == (METHOD.topk, METHOD.block) and not any(r.reason for r in records)
    pipe = WanPipeline.from_pretrained(model)
    same = vidaccel.generate(pipe, "a red circle", method="sla", **SMALL)
    config = vidaccel.generate(model, "a red circle", method=METHOD, density=None, **SMALL)
    assert np.array_equal(made.frames, same.frames) and np.array_equal(made.frames, config.frames)
    assert not any("proj_l" in name for name in pipe.transformer.state_dict())


def test_an_adapter(adapter, model, tmp_path):
    run = tmp_path / "run"  # of the training
    (run / "adapter").mkdir(parents=True)
    file = shutil.copy(adapter, run / "adapter" / FILE)
    made = vidaccel.generate("demo", "a red circle", method="sla", sla=run, **SMALL)
    assert made.report.method == "sla"
    assert f"{run} is the folder of a training: its {file.relative_to(run)} is used." in made.notes
    page = tmp_path / "report.html"
    more = {"compare": True, "report": page, "warm_up": True}
    vidaccel.generate("demo", "a red circle", sla=[adapter], **more, **SMALL)  # which method it is for, it says
    assert "transformer.safetensors" in page.read_text()


def test_an_adapter_brings_its_method(adapter):
    job = prepare("demo", Settings(prompt="a red circle"), Sparse(), sla=adapter)
    assert list(job.methods) == ["sla"] and job.why == "what transformer.safetensors was trained for"
    longer = prepare("demo", Settings(prompt="a red circle", frames=65), Sparse(), sla=str(adapter))
    assert list(longer.methods) == ["sla"] and not longer.loras  # the built-in LoRA for this length has another method


def test_block_sparse_attention_needs_no_training():
    settings = {"sla": {"linear_scope": "none", "block": (8, 8)}}
    made = vidaccel.generate("demo", "a red circle", method="sla", density=0.5, settings=settings, **SMALL)
    assert made.report.mean_density() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"settings": {"sla": {"topk": 0.6}}},
            "method is sla: .*topk 0.6 reads 2 of 4 key blocks at 32 tokens",
        ),
        ({"settings": {"sla": {"feature_map": "elu"}}}, "feature_map is elu, trained with softmax"),
        ({"settings": {"sla": {"topp": 0.6}}}, "settings is sla.topp: sla has no such setting"),
        ({"density": 0.8}, "reads 3 of 4 key blocks at 32 tokens, trained with 1"),
        ({"dense_steps": 1}, "schedule is .*first_steps=1.*, trained with"),
    ],
)
def test_other_settings_than_those_of_the_training(model, options, words):
    with pytest.raises(BadInput, match=words):
        vidaccel.generate(model, "a red circle", method="sla", **options, **SMALL)


def test_what_cannot_be(adapter, tmp_path):
    """Before weights are read."""
    other = write_adapter(tmp_path, vidaccel.demo.path(), base_hash="0123")
    for options, words in (
        ({"method": "sla"}, "method is sla: this model was not trained for it. Train it"),
        ({"method": "radial", "sla": adapter}, "sla is of use only with method sla"),
        ({"method": "sla", "sla": tmp_path / "gone"}, "sla cannot be used: .*gone is no adapter that can be read"),
        ({"method": "sla", "sla": other}, "sla transformer.safetensors was trained on .*, and this model is another"),
        ({"lora": adapter}, "lora .*is an adapter of SLA. Give it as sla"),
    ):
        with pytest.raises(BadInput, match=words):
            vidaccel.generate("demo", "a red circle", **options, **SMALL)
    pipe = WanPipeline.from_pretrained(vidaccel.demo.path())
    with pytest.raises(BadInput, match="not trained for SLA"):
        vidaccel.generate(pipe, "a red circle", method=SLA(), **SMALL)
