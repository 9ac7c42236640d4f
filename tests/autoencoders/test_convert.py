from __future__ import annotations

import json
import pickle
import subprocess

import pytest
import torch
from safetensors.torch import save_file
from tiny_dc import DATA, SMALL, make_autoencoder, make_video

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
    with pytest.raises(CheckpointError, match=r"lacks decoder.stages.2.op_list.1.main.conv2.conv.weight\. It does not"):
        convert.convert_state_dict(published)
    del published["decoder.stages.2.op_list.1.main.conv1.conv.weight"]
    with pytest.raises(CheckpointError, match="lacks decoder.stages.2.op_list.1.main.conv1.conv.weight and 1 more"):
        convert.convert_state_dict(published, model.config)


def test_an_unknown_key_is_named():
    _, published = _published()
    with pytest.raises(CheckpointError, match=r"has unknown keys: discriminator.weight\."):
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
    with pytest.raises(CheckpointError, match=r"no encoder.project_in.conv.conv.weight, so it is no.*begin with a, b"):
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


# -- files -------------------------------------------------------------------------------------------------------------


def _contents(published):
    prefixed = {f"module.{name}": value for name, value in published.items()}
    return {
        "ema": {"ema_model_state_dict": {"0.9999": published}, "step": 3},
        "ema without a tag": {"ema_model_state_dict": published},
        "both": {
            "model_state_dict": {n: torch.zeros_like(v) for n, v in published.items()},
            "ema_model_state_dict": {0.999: published},
        },
        "model": {"model_state_dict": published, "optimizer": {"lr": 0.1}},
        "module": {"model_state_dict": prefixed},
        "bare": published,
    }


@pytest.mark.parametrize("form", list(_contents({})))
def test_published_files_load(tmp_path, form):
    model, published = _published()
    torch.save(_contents(published)[form], tmp_path / "dc-ae-v-1.0-f4t4c4.pt")
    loaded = convert.load_published(tmp_path / "dc-ae-v-1.0-f4t4c4.pt", chunk_size=8)
    assert not loaded.training and loaded.config.chunk_size == 8 and loaded.config.scaling_factor == 1.0
    assert loaded(make_video(12)).sample.equal(model(make_video(12)).sample)


def test_safetensors_load_and_the_type_can_be_chosen(tmp_path):
    model, published = _published()
    save_file(published, tmp_path / "weights.safetensors")
    loaded = convert.load_published(tmp_path / "weights.safetensors", dtype=torch.bfloat16, scaling_factor=0.5)
    assert loaded.dtype == torch.bfloat16 and loaded.config.scaling_factor == 0.5
    for name, value in loaded.state_dict().items():
        assert value.equal(model.state_dict()[name].bfloat16())
    torch.save({"model_state_dict": {n: v.bfloat16() for n, v in published.items()}}, tmp_path / "half.pt")
    assert convert.load_published(tmp_path / "half.pt").dtype == torch.bfloat16


def test_a_file_goes_to_a_diffusers_folder_and_back(tmp_path):
    _, published = _published()
    torch.save({"model_state_dict": published}, tmp_path / "a.pt")
    convert.load_published(tmp_path / "a.pt", chunk_size=8).save_pretrained(tmp_path / "vae")
    model = AutoencoderDCV.from_pretrained(tmp_path / "vae")
    back = convert.to_published(model.state_dict(), model.config)
    assert back.keys() == published.keys() and all(back[name].equal(value) for name, value in published.items())


def test_a_truncated_file_is_refused(tmp_path):
    _, published = _published()
    for name, save in (("a.pt", torch.save), ("a.safetensors", save_file)):
        file = tmp_path / name
        save(published, file)
        content = file.read_bytes()
        for size in (0, 100, len(content) // 2, len(content) - 1000):
            file.write_bytes(content[:size])
            with pytest.raises(CheckpointError, match=rf"{name} \({size:,} bytes\) .*cut short: download it again"):
                convert.read_published(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="There is no file .*none.pt"):
        convert.read_published(tmp_path / "none.pt")


class _Runs:
    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self):
        return subprocess.check_call, (["touch", self.file],)


def test_code_in_a_file_is_not_run(tmp_path):
    proof = tmp_path / "ran"
    for name, save in (("a.pt", torch.save), ("b.pt", lambda what, file: file.write_bytes(pickle.dumps(what)))):
        save({"model_state_dict": _Runs(str(proof))}, tmp_path / name)
        with pytest.raises(CheckpointError, match=name):
            convert.read_published(tmp_path / name)
        assert not proof.exists()
    with pytest.raises(CheckpointError, match="something other than weights"):
        convert.read_published(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, but a DC-AE-V checkpoint holds ema_model_state_dict or model_state_dict"),
        ({"epoch": 1, "loss": 2.0}, "holds the keys epoch, loss, but"),
        ({}, "holds no parameters, but"),
        ({"ema_model_state_dict": {"a": {}, "b": {}}}, r"several averages \(a, b\): keep one"),
        ({"ema_model_state_dict": {}}, "holds no parameters, but"),
    ],
)
def test_another_content_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        convert.read_published(tmp_path / "a.pt")


def test_shapes_are_checked_before_weights_are_read(tmp_path, monkeypatch):
    _, published = _published()
    name = "decoder.conv_extra"
    torch.save({"model_state_dict": {**published, name: torch.zeros(1)}}, tmp_path / "a.pt")
    monkeypatch.setattr(AutoencoderDCV, "load_state_dict", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(CheckpointError, match=f"{tmp_path.name}.*unknown keys: {name}"):
        convert.load_published(tmp_path / "a.pt")


def test_changes_of_the_config_are_checked(tmp_path):
    _, published = _published()
    torch.save(published, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="chunk_size is 6"):
        convert.load_published(tmp_path / "a.pt", chunk_size=6)
    with pytest.raises(CheckpointError, match="other shapes"):
        convert.load_published(tmp_path / "a.pt", latent_channels=SMALL["latent_channels"] + 1)
