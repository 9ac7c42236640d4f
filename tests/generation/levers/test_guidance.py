"""Guidance-free adapters of a request: what is asked for, and how many passes it takes."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import numpy as np
import pytest
from diffusers import WanPipeline, WanTransformer3DModel
from gft_adapters import write_adapter

import vidaccel
from vidaccel.generation.errors import BadInput
from vidaccel.pipelines.guidance_free.adapter_file import OWN_FILE

SMALL = {"frames": 5, "height": 32, "width": 32, "steps": 2, "progress": False}


@pytest.fixture
def file(tmp_path) -> Path:
    base = vidaccel.demo.path()
    return write_adapter(tmp_path, base, WanTransformer3DModel.from_pretrained(base, subfolder="transformer"))


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """Grows with each forward pass of a Wan transformer."""
    seen, forward = [], WanTransformer3DModel.forward

    @functools.wraps(forward)  # whose signature `accelerate` reads
    def counted(self, *args, **kwargs):
        seen.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(WanTransformer3DModel, "forward", counted)
    return seen


def test_guidance_in_one_pass(file, passes):
    """Dense and sparse; without guidance a gated adapter is the model."""
    one = vidaccel.generate("demo", "a red circle", guidance_free=file, guidance_scale=3, **SMALL).frames
    assert len(passes) == 2
    two = vidaccel.generate("demo", "a red circle", guidance_scale=3, **SMALL).frames
    assert len(passes) == 6 and not np.array_equal(one, two)
    sparse = vidaccel.generate("demo", "a red circle", guidance_free=[file], method="radial", **SMALL)
    assert len(passes) == 8 and sparse.report.records
    plain = (vidaccel.generate("demo", "a red circle", guidance_free=f, guidance_scale=1, **SMALL) for f in (file, ()))
    assert np.array_equal(*(video.frames for video in plain))


@pytest.fixture
def own(tmp_path, file) -> Path:
    """The built-in model with an adapter of its own, and without the one that it is shipped with."""
    folder = tmp_path / "model"
    shutil.copytree(vidaccel.demo.path(), folder, ignore=shutil.ignore_patterns(OWN_FILE))
    shutil.copy(file, folder / "transformer" / OWN_FILE)
    return folder


def test_the_adapter_of_the_model_itself(own, file, passes):
    """The same video as with that file, in Python and for pipelines that are loaded; models without one say so."""
    video = vidaccel.generate(str(own), "a red circle", guidance_free=True, guidance_scale=3, **SMALL).frames
    assert len(passes) == 2
    given = vidaccel.generate(str(own), "a red circle", guidance_free=file, guidance_scale=3, **SMALL).frames
    assert np.array_equal(video, given)
    with vidaccel.guidance_free(WanPipeline.from_pretrained(own)) as handle:
        assert handle.adapters[0].path == own / "transformer" / OWN_FILE
    (own / "transformer" / OWN_FILE).unlink()
    passes.clear()
    with pytest.raises(
        BadInput, match=rf"guidance_free has no adapter to use: .* \(transformer/{OWN_FILE}\). Give the"
    ):
        vidaccel.generate(str(own), "a red circle", guidance_free=True, **SMALL)
    assert not passes


FEW = {
    "recipe": "consistency",
    "guidance_free": {"min_scale": 3.0, "max_scale": 4.0, "gated": False},
    "few_steps": {"sigmas": [1.0, 0.75, 0.5]},
}


def test_an_adapter_for_few_steps(tmp_path, passes):
    """Its steps and the nearest of its guidance scales are the defaults; others are refused before weights are read."""
    base = vidaccel.demo.path()
    transformer = WanTransformer3DModel.from_pretrained(base, subfolder="transformer")
    file = write_adapter(tmp_path, base, transformer, **FEW)
    small = {name: value for name, value in SMALL.items() if name != "steps"}
    one = vidaccel.generate("demo", "a red circle", guidance_free=file, **small).frames
    assert len(passes) == 3
    same = vidaccel.generate("demo", "a red circle", guidance_free=file, steps=3, guidance_scale=3, **small).frames
    assert np.array_equal(one, same)
    for options, words in (
        ({"steps": 20}, "steps is 20: transformer.safetensors was distilled to 3 steps. Give that, or leave it out"),
        ({"guidance_scale": 2}, "guidance_scale is 2.0: .* was trained from 3 up. Give at least that"),
        ({"guidance_scale": 5}, "guidance_scale is 5.0: .* was trained up to 4"),
    ):
        with pytest.raises(BadInput, match=words):
            vidaccel.generate("demo", "a red circle", guidance_free=file, **small, **options)
    with pytest.raises(BadInput, match="is a guidance-free adapter. Give it as guidance_free"):
        vidaccel.generate("demo", "a red circle", lora=file, **SMALL)


def test_few_steps_are_warmed_up_and_compared(tmp_path, passes):
    """A comparison starts with an uncounted run of as few steps as there can be: those of the adapter."""
    base = vidaccel.demo.path()
    transformer = WanTransformer3DModel.from_pretrained(base, subfolder="transformer")
    file = write_adapter(tmp_path, base, transformer, **FEW)
    small = {name: value for name, value in SMALL.items() if name != "steps"}
    vidaccel.generate("demo", "a red circle", guidance_free=file, compare=True, method="radial", **small)
    assert len(passes) == 4 * 3


def test_it_is_told_in_a_report(file, tmp_path):
    page = tmp_path / "report.html"
    options = {**SMALL, "method": "radial", "warm_up": False}
    vidaccel.generate("demo", "a red circle", guidance_free=file, compare=True, report=page, **options)
    assert "guidance in one pass" in page.read_text() and "transformer.safetensors" in page.read_text()


def test_what_cannot_be(tmp_path, file, passes):
    """Before weights are read."""
    base = vidaccel.demo.path()
    transformer = WanTransformer3DModel.from_pretrained(base, subfolder="transformer")
    (tmp_path / "other").mkdir()
    other = write_adapter(tmp_path / "other", base, transformer, base_hash="0123")
    for options, words in (
        ({"guidance_free": tmp_path / "gone"}, "guidance_free cannot be used: .*gone is no adapter that can be read"),
        (
            {"guidance_free": other},
            "guidance_free transformer.safetensors was trained on .*, and this model is another",
        ),
        ({"guidance_free": file, "negative_prompt": "ugly"}, 'negative_prompt is of no use .* "blurry" is baked into'),
        ({"guidance_free": file, "guidance_scale": 7}, "guidance_scale is 7.0: .* was trained up to 6. Give at most"),
        ({"lora": file}, "is a guidance-free adapter. Give it as guidance_free"),
    ):
        with pytest.raises(BadInput, match=words):
            vidaccel.generate("demo", "a red circle", **options, **SMALL)
    with pytest.raises(BadInput, match="guidance_free is for a model that is loaded here. Call vidaccel.guidance_free"):
        vidaccel.generate(WanPipeline.from_pretrained(base), "a red circle", guidance_free=file, **SMALL)
    assert not passes
