"""What a model was trained for is known wherever it goes, and told where it is not what runs."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from learned_models import write_models
from sla_models import METHOD as SLA_METHOD
from vsa_models import TRAINED, velocity

import vidaccel
from vidaccel import VSA, DMDScheduler, GridScheduler, RCMScheduler
from vidaccel.pipelines.acceleration.vsa_gates import VSAError
from vidaccel.pipelines.files.weight_files import WEIGHTS
from vidaccel.pipelines.trained_for import KEY

TRAINED_METHODS = {"vsa": TRAINED.method(), "sla": replace(SLA_METHOD, eps=SLA_METHOD.added_eps)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Name -> folder: the base, and models that were trained for "vsa" and "sla" as this package writes them."""
    return write_models(tmp_path_factory.mktemp("models"))


def as_downloaded(folder: Path, target: Path) -> Path:
    """What diffusers downloads of a model of the hub: of each part, weights and config.json."""
    kept = ("*.safetensors", "*.safetensors.index.json", "*config.json", "token*", "spiece*", "special*")
    for path in folder.rglob("*"):
        name = path.name
        if path.is_file() and any(path.match(pattern) for pattern in kept) and name not in OLDER:
            (target / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / path.relative_to(folder))
    shutil.copyfile(folder / "model_index.json", target / "model_index.json")
    return target


OLDER = ("vsa_config.json", "sla_config.json")


@pytest.mark.parametrize("method", TRAINED_METHODS)
def test_a_model_of_the_hub(models, method, tmp_path):
    pipe = WanPipeline.from_pretrained(as_downloaded(models[method], tmp_path / "model"))
    with vidaccel.accelerate(pipe) as handle:
        assert handle.method == TRAINED_METHODS[method]


@pytest.mark.parametrize("method", TRAINED_METHODS)
def test_a_folder_of_an_older_version(models, method, tmp_path):
    folder = shutil.copytree(models[method], tmp_path / "model") / "transformer"
    config = json.loads((folder / "config.json").read_text())
    (folder / f"{method}_config.json").write_text(json.dumps(config.pop(KEY)[method]))
    (folder / "config.json").write_text(json.dumps(config))
    pipe = WanPipeline.from_pretrained(folder.parent)
    before = dict(pipe.transformer.config)
    with vidaccel.accelerate(pipe) as handle:
        assert handle.method == TRAINED_METHODS[method] and KEY in pipe.transformer.config
        copied = copy.deepcopy(pipe)
        vidaccel.restore(copied)  # which leaves the original as it is
        assert dict(copied.transformer.config) == before and KEY in pipe.transformer.config
    assert dict(pipe.transformer.config) == before


@pytest.mark.parametrize("method", [*TRAINED_METHODS, "published"])
def test_what_is_saved_while_it_is_accelerated(models, method, tmp_path):
    """Its weights, and what they were trained for."""
    pipe = WanPipeline.from_pretrained(models[method])
    with vidaccel.accelerate(pipe) as handle:
        wanted = velocity(pipe.transformer)
        pipe.save_pretrained(tmp_path / "first")
    WanPipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    again = WanPipeline.from_pretrained(tmp_path / "first")
    with vidaccel.accelerate(again) as second:
        assert second.method == handle.method
        assert velocity(again.transformer).equal(wanted)
    if method != "sla":  # of what diffusers itself saves, the gates are gone
        with pytest.raises(VSAError, match=r"has none, although it was trained for them: it was saved without"):
            vidaccel.accelerate(WanPipeline.from_pretrained(tmp_path / "second"))


def _as_variant(folder: Path) -> dict:
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bf16.safetensors")
    return {"variant": "bf16"}


def _sharded_variant(folder: Path) -> dict:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names, places = sorted(tensors), {}
    for number in (1, 2):
        file = f"diffusion_pytorch_model.bf16-{number:05d}-of-00002.safetensors"
        part = {name: tensors[name] for name in names[number - 1 :: 2]}
        save_file(part, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "diffusion_pytorch_model.safetensors.index.bf16.json").write_text(json.dumps(index))
    return {"variant": "bf16"}


@pytest.mark.parametrize("change", [lambda folder: {}, _as_variant, _sharded_variant])
def test_gates_that_nothing_is_said_of(models, change, tmp_path):
    folder = shutil.copytree(models["published"], tmp_path / "model")
    options = change(folder / "transformer")
    pipe = WanPipeline.from_pretrained(folder, **options)
    with vidaccel.accelerate(pipe) as handle:
        assert handle.method == VSA(density=0.2)
        (why,) = [note for note in handle.report().notes if "no method was given" in note]
        assert why.endswith("nothing states its density, so 0.2, as FastVideo's scripts have it")


def test_projections_that_nothing_is_said_of(models, tmp_path, caplog):
    folder = shutil.copytree(models["sla"], tmp_path / "model")
    config = json.loads((folder / "transformer/config.json").read_text())
    (folder / "transformer/config.json").write_text(json.dumps({k: v for k, v in config.items() if k != KEY}))
    with vidaccel.accelerate(WanPipeline.from_pretrained(folder)) as handle:
        (note,) = [note for note in handle.report().notes if "weights of SLA" in note]
    assert handle.method.name == "tangent" and note in caplog.messages


@pytest.mark.parametrize("trained", TRAINED_METHODS)
@pytest.mark.parametrize("method", ["tangent", VSA(gated=False), vidaccel.SLA(linear_scope="none", block=(8, 8))])
def test_another_method_than_that_of_the_training_is_told(models, trained, method, caplog):
    pipe = WanPipeline.from_pretrained(models[trained])
    if trained == getattr(method, "name", "") == "sla":
        pytest.skip("settings other than those of the training are refused")
    with caplog.at_level(logging.WARNING), vidaccel.accelerate(pipe, method) as handle:
        told = f"transformer was trained for {trained}, and runs without what it learned for that"
        assert told in handle.report().notes and told in caplog.messages


class Hub:
    """A hub whose one repository is a folder; counts what is asked of it."""

    def __init__(self, folder: Path, broken: str = "") -> None:
        self.folder, self.broken, self.asked = folder, broken, []

    def __call__(self, repository, name, revision=None):
        self.asked.append((repository, name, revision))
        if self.broken and name.endswith(self.broken):
            raise LocalEntryNotFoundError("the network is down")
        if not (self.folder / name).is_file():
            raise EntryNotFoundError("404")
        return str(self.folder / name)


def of_the_hub(folder: Path, monkeypatch, broken: str = "") -> tuple[WanTransformer3DModel, Hub]:
    transformer = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    transformer.register_to_config(_name_or_path="some/model")
    hub = Hub(folder, broken)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    return transformer, hub


def test_the_hub_is_asked_once_for_each_file(models, monkeypatch):
    transformer, hub = of_the_hub(models["vsa"], monkeypatch)
    with vidaccel.accelerate(transformer) as handle:
        assert handle.method == TRAINED.method()
    weights = f"transformer/{WEIGHTS}"
    files = ["model_index.json", "transformer/config.json", f"{weights}.index.json", weights]
    assert [name for _, name, _ in hub.asked] == files


def test_a_revision_of_the_hub(models, monkeypatch):
    transformer, hub = of_the_hub(models["vsa"], monkeypatch)
    with vidaccel.accelerate(transformer, base="some/model@v2"):
        assert {(repository, revision) for repository, _, revision in hub.asked} == {("some/model", "v2")}


def test_a_hub_that_cannot_be_asked(models, monkeypatch, caplog):
    """What is not known is told with its cause, and nothing is taken for missing."""
    transformer, hub = of_the_hub(models["published"], monkeypatch, broken="json")
    with vidaccel.accelerate(transformer, schedule=vidaccel.DenseSchedule()) as handle:
        assert handle.method.name == "tangent"
        cause = "model_index.json of some/model cannot be had from the hub (the network is down)"
        told = f"whether the model was trained for a method cannot be told: {cause}"
        assert told in handle.report().notes and caplog.messages.count(told) == 1
    assert len(hub.asked) == 1
    with pytest.raises(VSAError, match=r"gates of transformer for VSA .* are not known: .*the network is down"):
        vidaccel.accelerate(transformer, "vsa")
    with pytest.raises(vidaccel.pipelines.acceleration.sla.SLAError, match=r"not known: .*the network is down"):
        vidaccel.accelerate(transformer, "sla")
    vidaccel.accelerate(transformer, "radial", schedule=vidaccel.DenseSchedule()).remove()


@pytest.mark.parametrize("scheduler", [DMDScheduler, GridScheduler, RCMScheduler])
def test_few_steps_with_full_attention_stay_dense_where_no_method_is_named(models, scheduler):
    pipe = WanPipeline.from_pretrained(models["base"])
    pipe.scheduler, call = scheduler(), {"num_frames": 5, "height": 32, "width": 32, "output_type": "latent"}
    call |= {"num_inference_steps": getattr(scheduler(), "fixed_steps", 3), "guidance_scale": 1.0}
    pipe.set_progress_bar_config(disable=True)

    def latents() -> torch.Tensor:
        return pipe("a dot", **call, generator=torch.Generator().manual_seed(0)).frames

    dense = latents()
    with vidaccel.accelerate(pipe, min_tokens=0) as handle:
        assert latents().equal(dense)
        report = handle.report()
        assert {record.reason for record in report.records} == {"distilled to few steps"}
        why = f"{scheduler.__name__} is of a model that was distilled to few steps, trained with attention to all"
        assert any(why in note for note in report.notes)
    with vidaccel.accelerate(pipe, "tangent", density=0.9) as handle:
        latents()
        assert not {record.reason for record in handle.report().records} & {"distilled to few steps"}
