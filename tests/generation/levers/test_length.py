"""Longer videos in `generate`: a LoRA brings its attention, RIFLEx is a switch, the built-in model has its own LoRA."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from diffusers import WanTransformer3DModel
from length_adapters import METHOD, write_length

import vidaccel
from vidaccel import LVSA, Riflex, demo
from vidaccel.generation.errors import BadInput
from vidaccel.generation.job import Sparse, prepare
from vidaccel.generation.requests.settings import Settings

SMALL = {"height": 32, "width": 32, "steps": 2, "progress": False}


@pytest.fixture
def transformer():
    return WanTransformer3DModel.from_pretrained(demo.path(), subfolder="transformer")


@pytest.fixture
def file(tmp_path, transformer) -> Path:
    return write_length(tmp_path, demo.path(), transformer, frames=3)


def made(**settings):
    return vidaccel.generate("demo", "a red circle", **{"frames": 9, **SMALL, **settings})


def test_the_lora_brings_its_attention(file):
    video = made(lora=file)
    assert video.name == "radial" and {r.reason for r in video.report.records} == {"", "first layers"}
    same = made(lora=file, method=METHOD)
    assert np.array_equal(video.frames, same.frames)
    assert not np.array_equal(video.frames, made(method=METHOD).frames)


def test_why_this_method_is_told(file):
    request = Settings("a red circle", frames=9, height=32, width=32, steps=2)
    assert prepare("demo", request, Sparse(), lora=file).why == "what transformer.safetensors was trained for"
    assert prepare("demo", request, Sparse((METHOD,)), lora=file).why == "as given"


def test_riflex_is_a_switch_and_comes_with_a_file(tmp_path, transformer):
    long = {"frames": 65}  # 17 latent frames, more than the period of the second component
    plain, riflex = made(**long), made(rope="riflex", **long)
    assert not np.array_equal(plain.frames, riflex.frames)
    assert np.array_equal(made().frames, made(rope="riflex").frames)  # no longer than those of the training
    file = write_length(tmp_path, demo.path(), transformer, frames=17, method=None, riflex=Riflex(9))
    assert np.array_equal(made(lora=f"{file}=0", **long).frames, riflex.frames)


def test_lvsa_makes_long_videos(file):
    assert made(method=LVSA(reference=2)).report.records


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "dense"}, "method cannot be: .* method radial then, dense now. Leave the method"),
        ({"method": "svg2"}, "method radial then, svg2 now"),
        ({"method": dataclasses.replace(METHOD, decay=0.9)}, "decay 0.3 then, 0.9 now"),
        ({"method": "radial", "dense_layers": 2}, "first_layers 1 then, 2 now"),
        ({"density": 1.0}, r"this is another: .*decay 0.3 then"),
        ({"compare": True}, "compare is of no use: transformer.safetensors was trained for one attention alone"),
        ({"frames": 13}, "frames cannot be: the video has 4 latent frames, and .* was trained up to 3"),
        ({"rope": "riflex"}, "rope is riflex: transformer.safetensors was trained with the plain one"),
        ({"rope": "yarn"}, "rope is yarn: there is none of that name; there are plain, riflex"),
    ],
)
def test_another_attention_is_refused(file, settings, words):
    with pytest.raises(BadInput, match=words):
        made(**{"lora": file, **settings})


def test_a_lora_of_another_base_is_refused(tmp_path, transformer):
    from tiny_wan import make_pipe

    base = tmp_path / "base"
    make_pipe().save_pretrained(base)
    file = write_length(tmp_path, base, transformer)
    with pytest.raises(BadInput, match="was trained on base .transformer., and this model is another"):
        made(lora=file)
    with pytest.raises(BadInput, match="rope is riflex: it is for the rotary embedding of Wan"):
        vidaccel.generate("demo-dc", "a red circle", rope="riflex", progress=False)


def test_the_built_in_model_uses_its_own_lora_for_longer_videos(tmp_path, transformer, monkeypatch):
    file = write_length(tmp_path, demo.path(), transformer, frames=10)
    monkeypatch.setattr(demo, "length_loras", lambda: [file])
    video = made(frames=37)
    assert video.name == "radial" and "its LoRA for longer videos is used (radial" in " ".join(video.notes)
    for other in ({"frames": 33}, {"frames": 41}, {"frames": 37, "method": "dense"}, {"frames": 37, "rope": "riflex"}):
        assert made(**other).name == "dense"


def test_the_shipped_loras_are_small_and_of_the_shipped_model():
    from vidaccel.pipelines.files.weight_files import transformer_files
    from vidaccel.pipelines.length import read_length

    adapters = [read_length(path) for path in demo.length_loras()]
    assert [adapter.trained.frames for adapter in adapters] == [17, 33]  # 65 and 129 frames
    for path, adapter in zip(demo.length_loras(), adapters, strict=True):
        assert path.stat().st_size <= 2_000_000
        assert adapter.base_hash == transformer_files(str(demo.path()), "transformer")


@pytest.mark.parametrize(("frames", "most"), [(37, 17), (65, 17), (69, 33), (129, 33), (133, 0), (33, 0)])
def test_the_shortest_lora_that_is_long_enough_is_taken(frames, most):
    from vidaccel.generation.levers.length import built_in_lora, trained_lengths

    found, note = built_in_lora("demo", frames, asked=False)
    assert [one.frames for one in trained_lengths(found)] == ([most] if most else [])
    assert bool(note) == bool(most)
