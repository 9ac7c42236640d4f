"""LoRAs of a request: what is asked for, and what the video shows of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from families import wan_kin
from safetensors.torch import load_file, save_file

import vidaccel
from vidaccel.attention import DenseSchedule, Radial
from vidaccel.attention.methods.description import describe
from vidaccel.generation.api import carry_out
from vidaccel.generation.errors import BadInput, worded
from vidaccel.generation.job import Sparse, prepare
from vidaccel.generation.levers.lora_fit import trained_elsewhere
from vidaccel.generation.levers.loras import attach, lora_files
from vidaccel.generation.models.inspected import inspect_model, inspect_pipeline
from vidaccel.generation.requests.settings import Settings
from vidaccel.lora.adapters.lora_file import save_lora
from vidaccel.lora.backbones.wan_own import WanModel
from vidaccel.pipelines.files.weight_files import transformer_files
from vidaccel.pipelines.loras.files import LoraFile, target_of

SMALL = {"frames": 5, "height": 32, "width": 32, "steps": 1, "progress": False}


@pytest.fixture
def file(tmp_path) -> Path:
    """A LoRA for the demo model, of large random numbers, as the trainer writes it."""
    config = WanTransformer3DModel.load_config(vidaccel.demo.path(), subfolder="transformer")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    weights = {
        f"blocks.0.attn1.to_v.lora_{m}.default.weight": torch.randn(*s)
        for m, s in zip("AB", ((2, width), (width, 2)), strict=True)
    }
    facts = {"part": "transformer", "levels": [0.0, 1.0]}
    names = WanModel.file_name.__get__(object.__new__(WanModel))
    return save_lora(weights, tmp_path / "pytorch_lora_weights.safetensors", names, 1.0, facts)


def test_a_lora_changes_the_video_as_much_as_its_weight(file):
    plain, without, half, full = (
        vidaccel.generate("demo", "a red circle", lora=lora, **SMALL).frames.astype(float)
        for lora in ((), f"{file}=0", f"{file.parent}=0.5", file)
    )
    assert np.array_equal(plain, without)
    assert 0 < np.abs(half - plain).mean() < np.abs(full - plain).mean()


def test_the_folder_of_a_run_and_of_a_checkpoint_is_that_of_its_lora(tmp_path, file):
    """It was taken for a LoRA without weights, and a checkpoint, which has other safetensors, failed in the run."""
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step_00000006"):
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter" / file.name).write_bytes(file.read_bytes())
        save_file({"x": torch.zeros(1)}, folder / "weights.safetensors")
        for given in (folder, LoraFile(folder), f"transformer:{folder}=0.5"):
            [found] = lora_files(given)
            assert found.path == folder / "adapter"
    assert lora_files(file.parent)[0].path == file.parent


def stage(path: Path, part: str, levels: list[float]) -> Path:
    """A file that says for which transformer it was trained."""
    save_file({"a": torch.zeros(1)}, path, {"vidaccel": json.dumps({"part": part, "levels": levels})})
    return path


def test_the_stage_of_a_file_is_that_of_its_header(tmp_path):
    for part, levels, wanted in (
        ("transformer_2", [0.0, 0.875], "transformer_2"),
        ("transformer", [0.875, 1.0], "transformer"),
        ("transformer", [0.0, 1.0], "all"),
    ):
        file = stage(tmp_path / "a.safetensors", part, levels)
        assert [target_of(lora) for lora in lora_files(file)] == [wanted]
    save_file({"a": torch.zeros(1)}, tmp_path / "b=2.safetensors")
    (lora,) = lora_files([f"{tmp_path / 'b=2.safetensors'}=-0.5"])
    assert (lora.path.name, lora.weight, lora.target) == ("b=2.safetensors", -0.5, None)


def test_a_target_stands_before_the_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.safetensors", "transformer:b.safetensors"):
        save_file({"a": torch.zeros(1)}, name)
    asked = ["transformer:a.safetensors=0.5", f"transformer_2:{tmp_path / 'a.safetensors'}", "all:a.safetensors"]
    asked += ["transformer:b.safetensors", LoraFile("a.safetensors", 2.0, "transformer_2")]
    assert [(lora.path.name, lora.weight, lora.target) for lora in lora_files(asked)] == [
        ("a.safetensors", 0.5, "transformer"),
        ("a.safetensors", 1.0, "transformer_2"),
        ("a.safetensors", 1.0, "all"),
        ("transformer:b.safetensors", 1.0, None),  # a file of that name is itself
        ("a.safetensors", 2.0, "transformer_2"),
    ]
    for text, words in (
        ("transformer:", "has the form PATH or PATH=WEIGHT, or TARGET: before one of them"),
        ("transformer:gone.safetensors", "lora is gone.safetensors: there is no such file or folder"),
        ("C:gone.safetensors", "lora is C:gone.safetensors: there is no such file or folder"),
        (LoraFile("a.safetensors", target="vae"), "its target must be one of all, transformer, transformer_2, not vae"),
    ):
        with pytest.raises(BadInput, match=words):
            lora_files(text)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> str:
    """A folder of a tiny model with two transformers, as Wan 2.2 A14B has."""
    pipe = WanPipeline(
        **wan_kin.parts(WanTransformer3DModel(**wan_kin.TRANSFORMER)),
        transformer_2=WanTransformer3DModel(**wan_kin.TRANSFORMER),
        boundary_ratio=0.9,
    )
    folder = tmp_path_factory.mktemp("two")
    pipe.save_pretrained(folder)
    return str(folder)


def plain(path: Path) -> Path:
    """A LoRA of another tool for that model, whose file says nothing of a transformer."""
    torch.manual_seed(len(path.name))
    name = "diffusion_model.blocks.0.self_attn.q.lora_{}.weight"
    save_file({name.format(end): torch.randn(*shape) for end, shape in (("A", (1, 32)), ("B", (32, 1)))}, path)
    return path


def test_a_pair_for_two_transformers_goes_where_it_is_said(two, tmp_path, monkeypatch):
    high, low = (plain(tmp_path / f"lightx2v_{noise}_noise_4steps.safetensors") for noise in ("high", "low"))
    seen = []

    def attached(pipe, loras):
        notes = attach(pipe, loras)
        parts = (pipe.transformer, pipe.transformer_2)
        seen.append([list(getattr(part, "peft_config", None) or {}) for part in parts])
        return notes

    monkeypatch.setattr("vidaccel.generation.api.attach", attached)
    asked = [f"transformer:{high}", f"transformer_2:{low}=0.5"]
    vidaccel.generate(two, "a dot", lora=asked, guidance_scale=1.0, **SMALL)
    assert seen == [[["lora_0"], ["lora_1"]]]


def test_a_pair_of_which_it_is_not_said_where_it_goes_is_refused_before_weights_are_read(two, tmp_path, no_weights):
    for name, part in (
        ("lightx2v_high_noise_4steps.safetensors", "transformer"),
        ("Wan22_LOW_rank64.safetensors", "transformer_2"),
        ("HighNoise.safetensors", "transformer"),
    ):
        words = f"{name} is by its name for one of the two transformers .* Write {part}:.*{name} \\(all:.*for both"
        with pytest.raises(BadInput, match=words):
            vidaccel.generate(two, "a dot", lora=plain(tmp_path / name), **SMALL)
    header = {"vidaccel": json.dumps({"part": "transformer_2", "levels": [0.0, 0.9]})}
    second = tmp_path / "own.safetensors"
    save_file(load_file(plain(second)), second, header)
    for target in ("transformer", "all"):
        with pytest.raises(BadInput, match=f"is said to be for {target}, and its header says .* for transformer_2"):
            vidaccel.generate(two, "a dot", lora=f"{target}:{second}", **SMALL)


def test_what_goes_into_both_transformers_is_told(two, tmp_path):
    settings, sparse = Settings(prompt="a dot"), Sparse(methods=("dense",))
    style, high = plain(tmp_path / "highlands.safetensors"), plain(tmp_path / "high.safetensors")
    told = [note for note in prepare(two, settings, sparse, lora=style).notes if "goes into both" in note]
    assert told == [
        "highlands.safetensors goes into both transformers: neither its header nor its target says that it is for one."
    ]
    assert not any("both" in note for note in prepare(two, settings, sparse, lora=f"all:{high}").notes)
    assert not any("both" in note for note in prepare("demo", settings, sparse, lora=high_of_the_demo(tmp_path)).notes)


def test_layers_that_the_model_lacks_are_told_before_the_steps(file):
    """In Python by the log, in the command line as a line of its own."""
    more = load_file(file)
    save_file(more | {name.replace("blocks.0", "blocks.77"): x.clone() for name, x in more.items()}, file)
    told: list[str] = []
    settings = Settings(prompt="a dot", frames=5, height=32, width=32, steps=1)
    carry_out(prepare("demo", settings, Sparse(methods=("dense",)), lora=file), on_note=told.append)
    assert any(note.startswith(f"{file.name} is not whole here: it is also for layers") for note in told), told


def high_of_the_demo(folder: Path) -> Path:
    """Of one transformer there is nothing to choose, whatever a file is called."""
    path = folder / "low_noise.safetensors"
    width = WanTransformer3DModel.load_config(vidaccel.demo.path(), subfolder="transformer")["attention_head_dim"]
    heads = WanTransformer3DModel.load_config(vidaccel.demo.path(), subfolder="transformer")["num_attention_heads"]
    name, width = "diffusion_model.blocks.0.self_attn.q.lora_{}.weight", width * heads
    save_file({name.format("A"): torch.zeros(1, width), name.format("B"): torch.zeros(width, 1)}, path)
    return path


def test_loras_that_cannot_be(tmp_path, file):
    other = tmp_path / "other.safetensors"
    save_file({"transformer.nothing.lora_A.weight": torch.zeros(1, 1)}, other)
    low = tmp_path / "low.safetensors"
    header = {"vidaccel": json.dumps({"part": "transformer_2", "levels": [0.0, 0.875]})}
    save_file(load_file(file), low, header)
    for lora, words in (
        (tmp_path / "gone", "lora is .*gone: there is no such file or folder"),
        (f"{tmp_path / 'gone'}=0.5", "lora is .*gone: there is no such file or folder"),
        (f"{file}=much", "lora is .*=much: what follows = must be its weight"),
        (f"{file}=inf", "lora is .*=inf: its weight must be finite"),
        (other, "lora cannot be used: .*other.safetensors"),
        (low, "lora cannot be used: low.safetensors is for transformer_2, and this pipeline has transformer alone.$"),
    ):
        with pytest.raises(BadInput, match=words):
            vidaccel.generate("demo", "a red circle", lora=lora, **SMALL)


def test_a_file_that_cannot_be_read_is_refused_before_a_model_is_loaded(tmp_path, file, monkeypatch):
    from vidaccel.generation import api

    def load(*_, **__):
        raise AssertionError("weights were about to be loaded")

    monkeypatch.setattr(api, "load", load)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:100])
    movie, page = tmp_path / "movie.mp4", tmp_path / "page.json"
    movie.write_bytes(b"\0\0\0 ftypisom")
    page.write_text('{"version": 1}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / file.name).write_bytes(b"page not found")
    for lora, words in (
        (cut, "lora cannot be used: .*cut.safetensors is damaged, or no safetensors file"),
        (tmp_path / "empty", "lora cannot be used: the folder .*empty has no weights"),
        (f"{tmp_path / 'folder'}=0.5", "lora cannot be used: .*pytorch_lora_weights.safetensors is damaged"),
        (movie, "lora cannot be used: .*movie.mp4 is none by its name: a LoRA is a .safetensors file, or one of"),
        (page, "lora cannot be used: .*page.json is none by its name"),
        (5, "lora is 5: it must be a file or folder, or a list of them"),
        ([(cut, 0.5)], "lora is .*: it must be a file or folder, or a list of them"),
        ("", "lora is empty. Give a file or folder"),
        ("=0.5", "lora is =0.5: it has the form PATH or PATH=WEIGHT"),
    ):
        with pytest.raises(BadInput, match=words):
            vidaccel.generate("demo", "a red circle", lora=lora, **SMALL)


def test_a_loaded_pipeline_loads_its_own(file):
    pipe = WanPipeline.from_pretrained(vidaccel.demo.path())
    with pytest.raises(BadInput, match="lora is for a model that is loaded here. Load it with load_lora_weights"):
        vidaccel.generate(pipe, "a red circle", lora=file, **SMALL)


@pytest.fixture
def no_weights(monkeypatch) -> None:
    """Nothing may be loaded."""
    from vidaccel.generation import api

    def load(*_, **__):
        raise AssertionError("weights were about to be loaded")

    monkeypatch.setattr(api, "load", load)


@pytest.mark.parametrize(
    ("names", "header", "words"),
    [
        (["diffusion_model.transformer_blocks.0.attn1.to_q"], {}, "has nothing for a WanTransformer3DModel"),
        (["transformer.transformer_blocks.0.attn.to_q"], {}, "has nothing for a WanTransformer3DModel"),
        (["diffusion_model.double_blocks.0.img_attn_qkv"], {}, "has nothing for a WanTransformer3DModel"),
        (
            ["diffusion_model.blocks.0.self_attn.q"],
            {"transformer": "LTXVideoTransformer3DModel"},
            "was trained for a LTXVideoTransformer3DModel, and demo has a WanTransformer3DModel",
        ),
        (["diffusion_model.blocks.0.self_attn.q"], {}, "is for layers of width 5, and blocks.0.attn1.to_q of this"),
    ],
)
def test_a_lora_of_another_family_or_size_is_refused_before_a_model_is_loaded(
    tmp_path, no_weights, names, header, words
):
    path = tmp_path / "a.safetensors"
    tensors = {f"{n}.lora_A.weight": torch.zeros(1, 5) for n in names}
    tensors |= {f"{n}.lora_B.weight": torch.zeros(5, 1) for n in names}
    save_file(tensors, path, {"vidaccel": json.dumps(header)})
    with pytest.raises(BadInput, match=f"lora cannot be used: a.safetensors {words}"):
        vidaccel.generate("demo", "a red circle", lora=path, **SMALL)


def test_what_a_lora_was_trained_with_is_compared_with_the_run(file):
    tensors = load_file(file)

    def notes(*methods: str, trained: str = "radial", density: float | None = None) -> list[str]:
        facts = {"attention": {"method": trained, "density": 0.3, "dense_layers": None}}
        save_file(tensors, file, {"vidaccel": json.dumps(facts)})
        settings = Settings(prompt="a red circle", steps=2)
        job = prepare("demo", settings, Sparse(methods=methods, density=density), lora=file)
        return [worded(note, lambda field: f"--{field}") for note in job.notes if "was trained" in note]

    said = "pytorch_lora_weights.safetensors was trained with radial attention at a density of 0.3, and "
    lost = " is another: what it learned may not come out whole."
    assert notes("tangent") == [f"{said}tangent{lost}"] and notes("dense") == [f"{said}dense{lost}"]
    assert notes("radial") == [f"{said}this run leaves it to the method: give --density 0.3 for what it learned."]
    assert notes("radial", density=0.5) == [f"{said}this run has 0.5: give --density 0.3 for what it learned."]
    assert not notes("radial", density=0.3)
    assert not notes("tangent", trained="dense")  # as the model itself


def test_the_weights_that_a_lora_was_trained_on_are_compared_with_those_of_the_model(file):
    tensors, own = load_file(file), transformer_files(str(vidaccel.demo.path()))

    def notes(**facts: Any) -> list[str]:
        save_file(tensors, file, {"vidaccel": json.dumps({"recipe": "lora", "part": "transformer", **facts})})
        job = prepare("demo", Settings(prompt="a red circle", steps=2), Sparse(), lora=file)
        return [note for note in job.notes if "was trained on" in note]

    said = "pytorch_lora_weights.safetensors was trained on mine (transformer), and "
    lost = "what it learned may not come out whole."
    files = "other files: other weights, or the same in another precision or in other parts. Where it has others"
    assert notes(base="mine", base_hash="0123") == [f"{said}demo has {files}, {lost}"]
    assert not notes(base="mine", base_hash=own) and not notes(base="mine")
    save_file(tensors, file, {"vidaccel": json.dumps({"recipe": "lora", "base": "mine", "base_hash": "0123"})})
    of_hub = replace(inspect_model("demo"), name="a/b", location="a/b")
    [note] = trained_elsewhere(lora_files(file), of_hub)
    assert note == f"{said}whether a/b has the same weights is not known: where it has others, {lost}"
    assert not trained_elsewhere(lora_files(file), replace(of_hub, location="mine"))
    pipe = WanPipeline.from_pretrained(vidaccel.demo.path())
    assert trained_elsewhere(lora_files(file), inspect_pipeline(pipe))
    assert not trained_elsewhere(lora_files(file), inspect_pipeline(WanPipeline(**pipe.components)))  # from where?


def test_block_size_and_dense_steps_of_the_training_are_compared_with_those_of_the_run(file):
    """A training is sparse in all steps, which a run is where it is asked for."""
    tensors, trained = load_file(file), Radial(block_size=16, schedule=DenseSchedule(first_layers=1))
    facts = {"attention": {**describe(trained), "density": 0.6, "dense_layers": None}}
    save_file(tensors, file, {"vidaccel": json.dumps(facts)})

    def notes(block_size: int, **sparse: Any) -> list[str]:
        overrides = {"radial": {"block_size": block_size}}
        asked = Sparse(methods=("radial",), density=0.6, overrides=overrides, **sparse)
        job = prepare("demo", Settings(prompt="a red circle", steps=2), asked, lora=file)
        return [worded(note, lambda field: f"--{field}") for note in job.notes if "was trained" in note]

    assert not notes(16, dense_steps=0)
    [note] = notes(32, dense_layers=2)
    assert "was trained with radial attention at a density of 0.6 with other settings than those of this run: " in note
    assert note.endswith(
        "--dense_steps 0 then, 0.24 now; --dense_layers 1 then, 2 now; radial.block_size 16 then, 32 now."
    )
    old = {"attention": {"method": "radial", "density": 0.6, "dense_layers": None}}
    save_file(tensors, file, {"vidaccel": json.dumps(old)})
    assert not notes(32)
