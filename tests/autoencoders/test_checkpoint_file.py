"""Files of published checkpoints, and the way back from a folder."""

from __future__ import annotations

import pickle
import subprocess

import pytest
import torch
from safetensors.torch import save_file
from tiny_dc import SMALL, make_autoencoder, make_video

from vidaccel.autoencoders import AutoencoderDCV, convert
from vidaccel.autoencoders.convert import CheckpointError


def _published(**changes) -> tuple[AutoencoderDCV, dict[str, torch.Tensor]]:
    model = make_autoencoder(**changes)
    return model, convert.to_published(model.state_dict(), model.config)


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
    assert convert.load_published(tmp_path / "half.pt", dtype="float32").dtype == torch.float32
    with pytest.raises(ValueError, match="dtype='fp32' is no dtype: give one of"):
        convert.load_published(tmp_path / "half.pt", dtype="fp32")


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


@pytest.mark.parametrize("name", ["a.mp4", "a.txt", "weights"])
def test_a_file_of_another_kind_is_refused_by_its_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(
        CheckpointError, match=rf"{name} is no checkpoint by its name, .*ends in .pt, .pth, .ckpt, .bin, "
    ):
        convert.read_published(tmp_path / name)


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


# -- formats and contents that other programs write --------------------------------------------------------------------


def test_a_file_of_the_older_format_loads(tmp_path):
    """It cannot be mapped into memory."""
    model, published = _published()
    torch.save({"model_state_dict": published}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    state = convert.load_published(tmp_path / "old.pt").state_dict()
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    content = (tmp_path / "old.pt").read_bytes()
    (tmp_path / "old.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="old.pt .*(damaged|cut short)"):
        convert.read_published(tmp_path / "old.pt")


@pytest.mark.parametrize(
    "name",
    [
        "encoder.project_in.conv.conv.weight",
        "encoder.project_out.conv.weight",
        "encoder.stages.1.op_list.0.main.conv1.conv.weight",
    ],
)
def test_a_flat_convolution_is_named_with_its_shape(name):
    _, published = _published()
    flat = published[name].flatten()
    with pytest.raises(CheckpointError, match=rf"{name} is \[{len(flat)}\] in .*convolution \[out, in, 3, 3, 3\]"):
        convert.convert_state_dict({**published, name: flat})


@pytest.mark.parametrize("averages", [{"0.999": {}}, {}, None])
def test_without_averages_the_model_weights_are_taken_and_it_is_said(tmp_path, caplog, averages):
    model, published = _published()
    torch.save({"ema_model_state_dict": averages, "model_state_dict": published}, tmp_path / "a.pt")
    state = convert.load_published(tmp_path / "a.pt", chunk_size=8, scaling_factor=1.0).state_dict()
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert "no averaged weights in ema_model_state_dict: those of model_state_dict are taken" in caplog.text


def test_averages_beside_their_settings(tmp_path):
    _, published = _published()
    torch.save({"ema_model_state_dict": {"decay": 0.99, "0.99": published}}, tmp_path / "a.pt")
    assert convert.read_published(tmp_path / "a.pt").keys() == published.keys()


@pytest.mark.parametrize("form", ["model_state_dict", "ema_model_state_dict", None])
def test_an_entry_that_is_no_parameter_is_named(tmp_path, form):
    _, published = _published()
    state = {**published, "num_batches": 3}
    torch.save(state if form is None else {form: state}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="a.pt has the key num_batches, which is a int and no parameter: take it"):
        convert.read_published(tmp_path / "a.pt")


def test_parameters_without_numbers_are_refused(tmp_path):
    _, published = _published()
    name = "decoder.project_in.conv.bias"
    torch.save({"model_state_dict": {**published, name: published[name].to("meta")}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=rf"{name} \[16\] without its numbers"):
        convert.read_published(tmp_path / "a.pt")


def test_what_weights_do_not_tell_is_said(tmp_path, caplog):
    _, published = _published()
    torch.save(published, tmp_path / "a.pt")
    convert.load_published(tmp_path / "a.pt")
    assert "a.pt is none of the published variants" in caplog.text
    assert "chunk_size is taken to be 40 and scaling_factor is taken to be 1.0" in caplog.text
    caplog.clear()
    convert.load_published(tmp_path / "a.pt", chunk_size=8)
    assert "chunk_size" not in caplog.text and "scaling_factor is taken to be 1.0" in caplog.text
    caplog.clear()
    convert.load_published(tmp_path / "a.pt", chunk_size=8, scaling_factor=0.5)
    assert caplog.text == ""


# -- the way back ------------------------------------------------------------------------------------------------------


def _folder(path, dtype=None, **save):
    model = make_autoencoder()
    model.to(dtype).save_pretrained(path, **save)
    return model


@pytest.mark.parametrize(
    "save",
    [
        {},
        {"max_shard_size": "20KB"},
        {"safe_serialization": False},
        {"variant": "bf16"},
        {"variant": "bf16", "max_shard_size": "20KB"},
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_folder_becomes_one_file_of_the_same_numbers(tmp_path, save, suffix):
    model = _folder(tmp_path / "vae", torch.bfloat16, **save)
    file = tmp_path / "new" / f"back{suffix}"
    convert.write_published_file(tmp_path / "vae", file)
    back = convert.read_published(file)
    for name, value in convert.to_published(model.state_dict(), model.config).items():
        assert back[name].dtype == torch.bfloat16 and back[name].equal(value)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [file.name]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_weights_do_not_tell_comes_back(tmp_path, suffix, caplog):
    """Of a published variant, too, whose own chunks and scale a fine-tuned one would be given."""
    told = {"scaling_factor": 0.7, "chunk_size": 16, "pad_frames": 3, "tail": "replicate"}
    make_autoencoder(**told).save_pretrained(tmp_path / "vae")
    file = tmp_path / f"back{suffix}"
    convert.write_published_file(tmp_path / "vae", file)
    assert {name: convert.load_published(file).config[name] for name in told} == told and not caplog.text
    assert convert.load_published(file, chunk_size=8).config.chunk_size == 8


def test_a_file_that_says_nonsense_of_its_configuration(tmp_path):
    _, published = _published()
    torch.save({"model_state_dict": published, "autoencoder_config": "[1"}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"autoencoder_config of .*a\.pt cannot be read"):
        convert.load_published(tmp_path / "a.pt")


def test_types_stay_as_they_are_one_by_one(tmp_path):
    model = _folder(tmp_path / "vae", torch.bfloat16)
    model.decoder.norm_out.float()
    model.save_pretrained(tmp_path / "vae")
    convert.write_published_file(tmp_path / "vae", tmp_path / "back.pt")
    back = convert.read_published(tmp_path / "back.pt")
    assert {value.dtype for value in back.values()} == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder.conv_out.weight": None}, r"vae lacks decoder.conv_out.weight \[12, 8, 3, 3, 3\]"),
        ({"extra.weight": [2]}, r"vae has unknown keys: extra.weight \[2\]"),
        ({"decoder.conv_out.bias": [5]}, r"vae has other shapes: decoder.conv_out.bias is \[5\], not \[12\]"),
    ],
)
def test_a_folder_that_does_not_fit_its_config_is_refused(tmp_path, change, message):
    state = _folder(tmp_path / "vae").state_dict()
    for name, shape in change.items():
        state.pop(name, None)
        if shape is not None:
            state[name] = torch.zeros(shape)
    save_file(state, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        convert.write_published_file(tmp_path / "vae", tmp_path / "back.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def test_which_variant_is_loaded(tmp_path):
    assert convert.variant_in(tmp_path / "none") is None
    make_autoencoder().save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    assert convert.variant_in(tmp_path) == convert.variant_in(tmp_path, "bf16") == "fp16"
    make_autoencoder().save_pretrained(tmp_path, variant="bf16")
    assert convert.variant_in(tmp_path) is None and convert.variant_in(tmp_path, "bf16") == "bf16"
    make_autoencoder().save_pretrained(tmp_path)
    assert convert.variant_in(tmp_path) is None and convert.variant_in(tmp_path, "bf16") == "bf16"


def test_a_folder_with_a_part_missing(tmp_path):
    folder = tmp_path / "vae"
    _folder(folder, max_shard_size="20KB")
    part = next(folder.glob("*-00001-of-*"))
    part.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks {part.name}, which its index names"):
        convert.write_published_file(folder, tmp_path / "back.pt")
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"index.json cannot be read as an index of weights"):
        convert.load_folder(folder)
    for file in folder.glob("diffusion*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="vae has no weights: neither diffusion_pytorch_model.safetensors"):
        convert.load_folder(folder)
    (folder / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(CheckpointError, match="cannot be loaded as an AutoencoderDCV: .*the class AutoencoderKL"):
        convert.load_folder(folder)
