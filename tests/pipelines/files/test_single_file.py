"""A transformer in a single file, with all else of a pipeline of diffusers: the same model, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from fake_hub import FakeHub
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import vidaccel
from vidaccel import demo
from vidaccel.cli import app
from vidaccel.generation.errors import BadInput
from vidaccel.generation.tuning import api as tuning
from vidaccel.pipelines.break_even import BreakEven
from vidaccel.pipelines.few_steps.wan_names import renamed
from vidaccel.pipelines.files.single_file import LayoutError, SingleFileError, pipeline_of
from vidaccel.pipelines.files.weight_files import transformer_files, transformer_tensors, weights_of

SMALL = {"frames": 5, "height": 32, "width": 32, "steps": 2, "progress": False}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("VIDACCEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Of the built-in model, in the names of Wan's own code, which ComfyUI has."""
    [file] = weights_of(str(demo.path()))
    return {renamed(name, "original"): value for name, value in load_file(file).items()}


@pytest.fixture
def file(tmp_path, weights) -> Path:
    path = tmp_path / "wan_tiny_bf16.safetensors"
    save_file(weights, path)
    return path


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_weights_are_those_of_the_file_and_all_else_of_the_components(tmp_path, weights, caplog, prefix):
    file = tmp_path / "a.safetensors"
    save_file({prefix + name: value for name, value in weights.items()}, file)
    folder = pipeline_of(file, demo.path())
    own, there = (transformer_tensors(str(place), lambda name: True) for place in (demo.path(), folder))
    assert own.keys() == there.keys() and all(torch.equal(own[name], there[name]) for name in own)
    assert (folder / "vae").resolve() == (demo.path() / "vae").resolve()
    assert "is written once in diffusers' layout" in caplog.text
    caplog.clear()
    assert pipeline_of(str(file), str(demo.path())) == folder and not caplog.records


def test_a_file_that_was_changed_and_links_that_are_gone_are_converted_anew(tmp_path, file, weights, cache):
    components = Path(shutil.copytree(demo.path(), tmp_path / "components"))
    first = pipeline_of(file, components)
    (first / "scheduler").unlink()
    (first / "scheduler").symlink_to(tmp_path / "gone")
    assert pipeline_of(file, components) == first and (first / "scheduler" / "scheduler_config.json").is_file()
    save_file({name: value.float() for name, value in weights.items()}, file)
    second = pipeline_of(file, components)
    assert second != first and {path.name for path in (cache / "converted").iterdir()} == {first.name, second.name}
    assert transformer_tensors(str(second), lambda name: True)["proj_out.weight"].dtype == torch.float32
    assert transformer_files(str(second)) != transformer_files(str(first))


def test_adapters_know_it_as_the_folder_that_diffusers_writes_of_the_same_weights(file):
    """The hash is of files: where dtype and number of files differ, as of published folders, it is another."""
    assert transformer_files(str(pipeline_of(file, demo.path()))) == transformer_files(str(demo.path()))


def test_a_video_is_that_of_the_folder(file):
    made = vidaccel.generate(file, "a red circle", components="demo", **SMALL)
    assert np.array_equal(made.frames, vidaccel.generate(demo.path(), "a red circle", **SMALL).frames)


def test_a_file_in_the_names_of_diffusers(tmp_path):
    [own] = weights_of(str(demo.path()))
    folder = pipeline_of(shutil.copy(own, tmp_path / "mine.safetensors"), demo.path())
    assert (folder / "transformer" / "config.json").is_file()


def test_ltx_with_its_autoencoder_in_the_file(tmp_path):
    """As it is published: one file, of which the transformer alone is taken."""
    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=8,
    )
    model.save_config(tmp_path / "components" / "transformer")
    index = {"_class_name": "LTXPipeline", "transformer": ["diffusers", "LTXVideoTransformer3DModel"]}
    (tmp_path / "components" / "model_index.json").write_text(json.dumps(index))
    names = {"time_embed": "adaln_single", "norm_q": "q_norm", "norm_k": "k_norm"}
    published = {"vae.decoder.weight": torch.zeros(1)}
    for name, value in model.state_dict().items():
        own = "patchify_proj" + name.removeprefix("proj_in") if name.startswith("proj_in.") else name
        for ours, theirs in names.items():
            own = own.replace(ours, theirs)
        published[f"model.diffusion_model.{own}"] = value
    save_file(published, tmp_path / "ltx.safetensors")
    folder = pipeline_of(tmp_path / "ltx.safetensors", tmp_path / "components")
    made = LTXVideoTransformer3DModel.from_pretrained(folder, subfolder="transformer").state_dict()
    assert all(torch.equal(made[name], value) for name, value in model.state_dict().items())


FP8 = torch.float8_e4m3fn
BITS = "give the file in bf16 or fp16"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: {n: v.to(FP8) for n, v in w.items()}, f"the weights in a.safetensors are in F8_E4M3: {BITS}"),
        (lambda w: w | {"scaled_fp8": torch.zeros(2).to(FP8)}, rf"with scales of their own \(fp8 scaled\): {BITS}"),
        (lambda w: w | {"blocks.0.ffn.0.scale_weight": torch.ones(1)}, "in 8 bits with scales of their own"),
        (
            lambda w: w | {"vace_blocks.0.x": torch.zeros(1)},
            "has 1 weights that the Wan.* has not, such as vace_blocks",
        ),
        (
            lambda w: {n: v for n, v in w.items() if "blocks.0.ffn" not in n},
            r"lacks 4 weights of the Wan.*s.0.ffn",
        ),
        (
            lambda w: {n: v[:1] for n, v in w.items()},
            r"another model than the components: its .* is \[1, .*Give",
        ),
        (lambda w: {"a": torch.zeros(1)}, "is another model than the components: it lacks"),
    ],
)
def test_other_files_are_refused(tmp_path, weights, cache, change, words):
    file = tmp_path / "a.safetensors"
    save_file({name: value.contiguous() for name, value in change(weights).items()}, file)
    with pytest.raises(SingleFileError, match=words):
        pipeline_of(file, demo.path())
    assert not cache.exists()


def test_what_is_no_file_of_weights_is_refused(tmp_path, file):
    with pytest.raises(SingleFileError, match=r"there is no file .*/gone\.safetensors: correct the path"):
        pipeline_of(tmp_path / "gone.safetensors", demo.path())
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SingleFileError, match="damaged, or no safetensors file .*: download it again"):
        pipeline_of(damaged, demo.path())
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(SingleFileError, match=r"a\.gguf ends in \.gguf: transformers are read from \.safe"):
        pipeline_of(tmp_path / "a.gguf", demo.path())


def test_other_components_are_refused(tmp_path, file):
    folder = tmp_path / "other"
    (folder / "transformer").mkdir(parents=True)
    with pytest.raises(SingleFileError, match=r"other has no model_index\.json and transformer/config\.json: give the"):
        pipeline_of(file, folder)
    (folder / "transformer" / "config.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "CogVideoXTransformer3DModel"]}))
    with pytest.raises(SingleFileError, match="has a CogVideoXTransformer3DModel, which diffusers does not read from"):
        pipeline_of(file, folder)


def test_forecasts_break_even_and_tune_take_it(file, tmp_path, monkeypatch):
    run, given = CliRunner().invoke, ["--model", str(file), "--components", "demo"]
    size = ["--frames", "33", "--height", "128", "--width", "128"]
    told = [run(app, ["info", "--forecast", *size, *some]) for some in (given, ["--model", "demo"])]
    assert all(each.exit_code == 0 for each in told), told
    words = [" ".join(each.stdout.split()) for each in told]
    assert words[0][words[0].index("tokens") :] == words[1][words[1].index("tokens") :]
    monkeypatch.setattr(tuning, "find_break_even", lambda *_, **__: BreakEven(None, 0, ()))
    monkeypatch.setattr(tuning, "store", lambda *_: tmp_path)
    keys = [
        tuning.measured_break_even(given[0], components=given[1], device="cpu")[1]
        for given in ((file, "demo"), ("demo", None))
    ]
    assert keys[0] == keys[1]
    with pytest.raises(BadInput, match="components is demo: is of use only with a single file as the model"):
        tuning.measured_break_even(heads=2, head_dim=16, components="demo")
    monkeypatch.setattr(tuning, "carried_out", lambda plan, **_: plan)
    plan = vidaccel.tune(file, "a red circle", components="demo", out=tmp_path / "tune", min_psnr=30, **SMALL)
    assert plan.job.facts.location == str(pipeline_of(file, demo.path()))


def test_generate_says_what_is_missing_or_of_no_use(file, tmp_path):
    for model, options, words in (
        (
            file,
            {},
            "model is .*: it is a transformer alone, or no model. Give the diffusers pipeline that has",
        ),
        ("demo", {"components": "demo-dc"}, "components is demo-dc: is of use only with a single file as the model"),
        (tmp_path / "a.gguf", {"components": "demo"}, "model cannot be used: there is no file .*a.gguf"),
        (file, {"components": "nowhere"}, 'neither "demo" nor "demo-dc", nor a folder here'),
    ):
        with pytest.raises(BadInput, match=words):
            vidaccel.generate(model, "a red circle", **options, **SMALL)


def test_of_components_of_the_hub_the_weights_of_the_transformer_are_not_downloaded(tmp_path, file, monkeypatch):
    """Where they are there later, such as for another use, nothing is converted anew."""
    known = FakeHub(tmp_path / "hub", {"wan/tiny": demo.path()}).install(monkeypatch)
    folder = pipeline_of(file, "wan/tiny")
    assert "transformer/config.json" in known.got["wan/tiny"] and "vae/config.json" in known.got["wan/tiny"]
    assert not any(name.startswith("transformer/") and name.endswith("tensors") for name in known.got["wan/tiny"])
    assert transformer_files(str(folder)) == transformer_files(str(demo.path()))
    known.snapshot_download("wan/tiny")
    assert pipeline_of(file, "wan/tiny") == folder


def test_components_of_the_hub_that_cannot_be_had(file, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LayoutError, match="components: nobody/nothing cannot be had from the hub"):
        pipeline_of(file, "nobody/nothing")
