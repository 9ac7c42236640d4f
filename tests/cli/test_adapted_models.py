"""Adapter-only weights on the command line, and what a model states of frames and sizes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from vidaccel.autoencoders import AutoencoderDCV
from vidaccel.generation.errors import BadInput
from vidaccel.generation.media.video_reader import read_video
from vidaccel.generation.models.inspected import DEFAULTS_FILE, inspect_model
from vidaccel.generation.requests.settings import Settings
from vidaccel.lora.adapters.adapter import AdaptedModel, save_adapter
from vidaccel.pipelines.deep_compression import adapted, adapter_folder

DEEP = {"latent_channels": 8, "block_out_channels": (8, 8, 16, 16), "layers_per_block": (0, 1, 1, 1), "chunk_size": 8}


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """4x in space."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("autoencoders") / "deep"
    AutoencoderDCV(**DEEP).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tiny_model, autoencoder, tmp_path):
    """As `ae_adapt` writes one: base and autoencoder lie elsewhere."""
    from diffusers import WanTransformer3DModel

    transformer = WanTransformer3DModel.from_pretrained(tiny_model, subfolder="transformer")
    adapted.retarget(transformer, 8, 8)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.02)
    facts = {"base": str(tiny_model), "autoencoder": str(autoencoder)}
    trained = ("patch_embedding.", "proj_out.")
    folder = tmp_path / "run" / "adapter"
    return save_adapter(transformer.state_dict(), folder, trained, facts, AdaptedModel.of(transformer))


def _words(text: str) -> str:
    return " ".join(text.split())


def _sizes(model) -> tuple[int, ...]:
    settings = Settings("a dot").checked(inspect_model(str(model)))
    return settings.frames, settings.height, settings.width, settings.steps, settings.guidance_scale


def test_a_video_of_an_adapter_whose_autoencoder_lies_elsewhere(vidaccel, adapter, tmp_path):
    options = ("--frames", 5, "--height", 20, "--width", 30, "--steps", 1, "--device", "cpu")
    result = vidaccel("generate", "a dot", "--model", adapter, *options, "--out", tmp_path / "out.mp4")
    assert result.exit_code == 0, (result.output, result.exception)
    assert read_video(tmp_path / "out.mp4")[0].shape == (5, 20, 30, 3)


def test_its_own_autoencoder_comes_first_and_another_may_be_seen_from_its_folder(adapter, autoencoder, edit_json):
    assert inspect_model(str(adapter)).autoencoder == str(autoencoder)
    shutil.copytree(autoencoder, adapter.parent / "beside")
    edit_json(adapter / "adapter.json", autoencoder="../beside")
    assert inspect_model(str(adapter)).autoencoder == str(adapter / "../beside")
    torch.manual_seed(0)
    AutoencoderDCV(**{**DEEP, "block_out_channels": (8,) * 5, "layers_per_block": (0, 1, 1, 1, 1)}).save_pretrained(
        adapter / "vae"
    )
    facts = inspect_model(str(adapter))
    assert facts.autoencoder is None and facts.size_factor == 8


@pytest.mark.parametrize("command", [("generate", "a dot"), ("info", "--forecast")])
def test_an_autoencoder_that_is_not_there_is_named(vidaccel, adapter, edit_json, command):
    edit_json(adapter / "adapter.json", autoencoder="/gone/deep")
    result = vidaccel(*command, "--model", adapter)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "the autoencoder that adapter.json names, /gone/deep, is not there" in result.stderr
    assert f"Copy the folder of its AutoencoderDCV to {adapter / 'vae'}" in result.stderr


def test_an_autoencoder_of_another_kind_is_refused(vidaccel, adapter, tiny_model, edit_json):
    edit_json(adapter / "adapter.json", autoencoder=str(tiny_model / "vae"))
    result = vidaccel("info", "--forecast", "--model", adapter)
    assert result.exit_code == 2 and "has the class AutoencoderKLWan, but a video model needs" in result.stderr


def test_a_plan_counts_the_base_and_the_autoencoder(vidaccel, adapter, autoencoder, tiny_model, edit_json, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    size = ("--frames", 8, "--height", 64, "--width", 64)
    text = _words(vidaccel("info", "--forecast", "--model", adapter, *size).stdout)
    for name, file in (
        ("vae", next(autoencoder.glob("*.safetensors"))),
        ("transformer of the base", next((tiny_model / "transformer").glob("*.safetensors"))),
        ("text_encoder of the base", next((tiny_model / "text_encoder").glob("*.safetensors"))),
    ):
        assert f"{name} {file.stat().st_size / 1e6:.1f} MB" in text
    assert "vae of the base" not in text
    edit_json(adapter / "adapter.json", base="nobody/no-such-base")
    text = _words(vidaccel("info", "--forecast", "--model", adapter, *size).stdout)
    assert "without the base model nobody/no-such-base, which is not on this machine" in text


# -- what a model states -----------------------------------------------------------------------------------------------


def test_an_adapter_states_its_defaults(adapter, edit_json):
    assert inspect_model(str(adapter)).call_defaults()["frames"] == 80
    edit_json(adapter / "adapter.json", defaults={"frames": 32, "height": 128, "width": 96})
    assert _sizes(adapter) == (32, 128, 96, 50, 5.0)


def test_a_pipeline_states_its_defaults(tiny_configs):
    own = {"frames": 9, "height": 64, "width": 32, "steps": 4, "guidance_scale": 1.5}
    (tiny_configs / DEFAULTS_FILE).write_text(json.dumps(own))
    assert _sizes(tiny_configs) == tuple(own.values())
    (tiny_configs / DEFAULTS_FILE).write_text(json.dumps({"frames": 9}))
    assert _sizes(tiny_configs) == (9, 480, 832, 50, 5.0)
    # What the trainer writes is what is read here.
    assert adapter_folder.DEFAULTS_FILE == DEFAULTS_FILE


def test_what_is_given_counts_more(tiny_configs):
    (tiny_configs / DEFAULTS_FILE).write_text(json.dumps({"frames": 9, "height": 64}))
    settings = Settings("a dot", frames=5).checked(inspect_model(str(tiny_configs)))
    assert (settings.frames, settings.height) == (5, 64)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ([9], "must be an object, and is a list"),
        ({"fps": 9}, "they may have frames, height"),
        ({"frames": 9.5}, "the default frames is 9.5: it must be a whole number from 1"),
        ({"height": 0}, "the default height is 0"),
        ({"steps": True}, "the default steps is True"),
        ({"guidance_scale": "5"}, "the default guidance_scale is '5': it must be a number from 1"),
    ],
)
def test_defaults_that_make_no_sense_are_named_with_their_file(tiny_configs, stated, message):
    (tiny_configs / DEFAULTS_FILE).write_text(json.dumps(stated))
    with pytest.raises(BadInput, match=rf"{DEFAULTS_FILE}.*{message}"):
        inspect_model(str(tiny_configs))


def test_defaults_of_the_built_in_models():
    from vidaccel.demo import modeling

    rest = (128, 128, modeling.STEPS, modeling.GUIDANCE_SCALE)
    assert _sizes("demo") == (33, *rest) and _sizes("demo-dc") == (32, *rest)
