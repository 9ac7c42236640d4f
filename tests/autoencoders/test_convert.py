from __future__ import annotations

import json

import pytest
import torch
from tiny_dc import DATA, make_autoencoder

from vidaccel.autoencoders import PRESETS, AutoencoderDCV, convert
from vidaccel.autoencoders.convert import CheckpointError

FULL = {"f32t4c32": "dc-ae-v-f32t4c32-1.0.keys.json", "f64t4c128": "dc-ae-v-f64t4c128-1.0.keys.json"}
CONFIGS = [
    {},
    {"block_out_channels": (4, 4, 8, 4, 16), "layers_per_block": (0, 2, 0, 3, 1), "latent_channels": 3},
    {"layers_per_block": (0, 1, 1, 0)},
    {"layers_per_block": (0, 0, 0, 0)},
    {"block_out_channels": (8, 8, 16), "layers_per_block": (0, 1, 2)},
]


def _keys(name: str) -> dict[str, list[int]]:
    return json.loads((DATA / FULL[name]).read_text())


def _published(**changes) -> tuple[AutoencoderDCV, dict[str, torch.Tensor]]:
    model = make_autoencoder(**changes)
    return model, convert.to_published(model.state_dict(), model.config)


# -- names and shapes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FULL)
def test_full_size_models_convert_and_come_back(name):
    """Every key and shape of the published files, without memory for them."""
    shapes = _keys(name)
    published = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    state = convert.convert_state_dict(published)
    assert len(state) == len(published) and {id(v) for v in state.values()} == {id(v) for v in published.values()}
    with torch.device("meta"):
        model = AutoencoderDCV.from_preset(name)
    model.load_state_dict(state, strict=True, assign=True)
    back = convert.to_published(state, model.config)
    assert {key: list(value.shape) for key, value in back.items()} == shapes
    assert all(back[key] is value for key, value in published.items())


@pytest.mark.parametrize("name", FULL)
def test_full_size_configs_are_found(name):
    config = convert.infer_config(_keys(name))
    assert {key: config[key] for key in PRESETS[name]} == PRESETS[name] and config["in_channels"] == 3


@pytest.mark.parametrize("changes", CONFIGS)
def test_any_width_converts_and_comes_back(changes):
    model, published = _published(**changes)
    found = convert.infer_config({name: value.shape for name, value in published.items()})
    for key in ("in_channels", "latent_channels"):
        assert found[key] == model.config[key]
    for key in ("block_out_channels", "layers_per_block"):
        assert found[key][1:] == tuple(model.config[key])[1:]
    state = convert.convert_state_dict(published)
    assert state.keys() == model.state_dict().keys()
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["model.", "module.", "module.model.", "model.module."])
def test_prefixes_are_taken_off(prefix):
    model, published = _published()
    state = convert.convert_state_dict({prefix + name: value for name, value in published.items()})
    assert state.keys() == model.state_dict().keys()
    # A prefix that only some have is a part of the name.
    some = {**published, "model.extra": torch.zeros(1)}
    assert convert.strip_prefix(some) == some


# -- checkpoints that do not fit ---------------------------------------------------------------------------------------


def test_a_missing_key_is_named():
    model, published = _published()
    del published["decoder.stages.2.op_list.1.main.conv2.conv.weight"]
    with pytest.raises(CheckpointError, match=r"conv2.conv.weight \[16, 16, 3, 3, 3\]\. It does not"):
        convert.convert_state_dict(published)
    del published["decoder.stages.2.op_list.1.main.conv1.conv.weight"]
    with pytest.raises(CheckpointError, match=r"lacks decoder.stages.2.op_list.1.main.conv1.conv.weight \[.*and 1 m"):
        convert.convert_state_dict(published, model.config)


def test_an_unknown_key_is_named():
    _, published = _published()
    with pytest.raises(CheckpointError, match=r"has unknown keys: discriminator.weight \[1\]\."):
        convert.convert_state_dict({**published, "discriminator.weight": torch.zeros(1)})


def test_a_wrong_shape_is_named_with_what_it_should_be():
    _, published = _published()
    name = "decoder.stages.2.op_list.1.main.conv1.conv.bias"
    with pytest.raises(CheckpointError, match=rf"other shapes: {name} is \[3\], not \[16\]\..*latent_channels 4"):
        convert.convert_state_dict({**published, name: torch.zeros(3)})


def test_another_variant_is_refused_by_key_and_shape():
    with pytest.raises(CheckpointError, match=r"encoder.project_out.conv.weight is \[32, .*\], not \[64, .*and 2 more"):
        convert.check_shapes(_keys("f32t4c32"), PRESETS["f32t4c64"])
    with pytest.raises(CheckpointError, match="lacks encoder.stages.6.op_list.4.main.conv.conv.weight"):
        convert.check_shapes(_keys("f32t4c32"), PRESETS["f64t4c128"])
    with pytest.raises(CheckpointError, match="lacks decoder.stages.6.op_list.0.main.conv1.conv.weight"):
        convert.check_shapes(_keys("f64t4c128"), PRESETS["f32t4c32"])


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(CheckpointError, match=r"no encoder.project_in.conv.conv.weight \(.*so it is no.*with a, b"):
        convert.convert_state_dict({"a": torch.zeros(1), "b": torch.zeros(1)})
    _, published = _published()
    bare = {name: value for name, value in published.items() if "stages" not in name}
    with pytest.raises(CheckpointError, match="no parameters of encoder.stages.1"):
        convert.convert_state_dict(bare)


def test_parameters_that_do_not_fit_are_not_published():
    model, _ = _published()
    state = model.state_dict()
    state["extra"] = state.pop("encoder.conv_in.bias")
    with pytest.raises(CheckpointError, match="encoder.conv_in.bias"):
        convert.to_published(state, model.config)


def test_of_a_published_variant_it_is_known(caplog):
    convert._warn_of_guesses(convert.infer_config(_keys("f32t4c32")), "a.pt")
    assert caplog.text == ""
