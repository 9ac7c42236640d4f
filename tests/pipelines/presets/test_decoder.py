"""The lever `decoder` of presets."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from tiny_decoders import decoder_for

import vidaccel
from vidaccel import Preset, demo
from vidaccel.pipelines.presets import PresetError, load_preset, save_preset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A decoder of the built-in Wan model, of random weights."""
    vae = AutoencoderKLWan.from_pretrained(demo.path(), subfolder="vae")
    place = tmp_path_factory.mktemp("presets") / "tiny"
    decoder_for(vae, autoencoder="AutoencoderKLWan").save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def pipe():
    pipe = WanPipeline.from_pretrained(demo.path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def frames(pipe):
    generator = torch.Generator().manual_seed(0)
    call = {"num_frames": 9, "height": 64, "width": 64, "num_inference_steps": 2, "generator": generator}
    return pipe("a red circle moves left on a grey background", output_type="pt", **call).frames


def test_it_is_kept_in_files_and_found_beside_them(folder):
    preset = Preset(name="a", decoder="tiny")
    assert preset.levers() == {"decoder": "tiny"}
    (folder.parent / "a.yaml").write_text("version: 1\nname: a\ndecoder: tiny\n")
    assert load_preset(folder.parent / "a.yaml").decoder == str(folder)
    for name in ("own", "owner/name"):
        saved = save_preset(preset.replace(decoder=name), folder.parent / "b.yaml")
        assert load_preset(saved).decoder == name
    (folder.parent / "c.yaml").write_text("version: 1\nname: a\ndecoder: presets/tiny\n")
    (folder.parent / "presets").mkdir()
    (folder.parent / "presets" / "tiny").mkdir()
    assert load_preset(folder.parent / "c.yaml").decoder == str(folder.parent / "presets" / "tiny")


def test_it_is_put_in_and_taken_out(pipe, folder):
    plain = frames(pipe)
    preset = Preset(name="a", decoder=folder)
    with vidaccel.apply(pipe, preset) as handle:
        other = frames(pipe)
        told = handle.report()
    assert other.shape == plain.shape and not torch.allclose(other, plain, atol=0.01)
    assert any("frames come from tiny" in note for note in told.notes)
    assert torch.equal(frames(pipe), plain)
    with vidaccel.tiny_decoder(pipe, folder):
        assert torch.equal(frames(pipe), other)
        with pytest.raises(PresetError, match="decoder: .*has a tiny one already"):
            vidaccel.apply(pipe, preset)
        vidaccel.restore(pipe)
        assert torch.equal(frames(pipe), plain)


@pytest.mark.parametrize(
    ("decoder", "words"),
    [
        (3, "decoder.*must be a file, a folder or a hub id"),
        (" ", "decoder.*must be a file, a folder or a hub id"),
        ("nowhere", "decoder.*there is no tiny decoder nowhere"),
        ("own", "decoder.*has no tiny decoder of its own"),
    ],
)
def test_what_cannot_be_is_refused(pipe, decoder, words):
    with pytest.raises(PresetError, match=words):
        vidaccel.apply(pipe, Preset(name="a", decoder=decoder))
    assert not hasattr(pipe, "_vidaccel_preset")
