"""Tiny decoders in `vidaccel.generate`, on the built-in models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vidaccel
from vidaccel import demo
from vidaccel.generation.errors import BadInput
from vidaccel.generation.waterfall.stages import stages

PROMPT = "a red circle moves left on a grey background"
SMALL = {"frames": 32, "height": 128, "width": 128, "steps": 4, "device": "cpu", "progress": False}


def test_the_built_in_model_has_one_of_its_own():
    plain = vidaccel.generate("demo-dc", PROMPT, **SMALL)
    made = vidaccel.generate("demo-dc", PROMPT, decoder="own", **SMALL)
    assert made.frames.shape == plain.frames.shape
    error = ((made.frames / 255.0 - plain.frames / 255.0) ** 2).mean()
    assert 20 < -10 * np.log10(error) < 60  # near, and not the same
    assert any("frames come from tiny_decoder" in note for note in made.account.notes)
    assert made.name == plain.name


def test_it_is_small():
    weights = sum(file.stat().st_size for file in (demo.path(demo.DC) / "tiny_decoder").iterdir())
    assert weights < 2.5 * 2**20


def test_what_cannot_be_is_bad_input_of_its_own_field(monkeypatch):
    monkeypatch.setattr("vidaccel.generation.api.load", lambda *_, **__: pytest.fail("weights were about to be loaded"))
    with pytest.raises(BadInput, match="decoder .*has no tiny decoder of its own"):
        vidaccel.generate("demo", PROMPT, decoder="own", **{**SMALL, "frames": 9})
    with pytest.raises(BadInput, match="decoder .*nowhere: there is no such file or folder. Give a file"):
        vidaccel.generate("demo", PROMPT, decoder="nowhere", **{**SMALL, "frames": 9})


def test_none_leaves_out_that_of_a_preset():
    from vidaccel.generation.levers.presets import with_levers

    preset = vidaccel.Preset(name="a", decoder="own")
    assert with_levers(preset, decoder="none").decoder is None
    assert with_levers(None, decoder="own").decoder == "own"


def test_it_is_the_last_row_of_a_waterfall():
    preset = vidaccel.Preset(name="a", model="demo-dc", num_inference_steps=4, decoder="own")
    rows = stages(preset)
    assert [row.name for row in rows] == ["base", "steps", "decoder"]
    assert rows[-1].preset.decoder == "own" and rows[-2].preset.decoder is None


def test_it_computes_in_the_transformers_dtype_where_it_is_told_to():
    pipe = vidaccel.DCVideoGenPipeline.from_pretrained(demo.path(demo.DC), dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_frames": 8, "height": 64, "width": 64, "num_inference_steps": 1, "output_type": "pt"}
    with vidaccel.tiny_decoder(pipe, dtype=torch.bfloat16):
        frames = pipe(PROMPT, generator=torch.Generator().manual_seed(0), **call).frames
    assert frames.shape == (1, 8, 3, 64, 64) and frames.isfinite().all()
