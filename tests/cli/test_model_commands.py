"""`vidaccel convert` and `vidaccel adapt`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vidaccel.autoencoders import AutoencoderDCV
from vidaccel.cli import app

GOLDEN = Path(__file__).parents[1] / "data" / "dc_ae_v_f32t4_tiny.safetensors"


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.output


@pytest.fixture
def published(tmp_path):
    path = tmp_path / "dc-ae-v-tiny.safetensors"
    save_file({k: v for k, v in load_file(GOLDEN).items() if k.startswith("model.")}, path)
    return path


def test_there_and_back(published, tmp_path):
    folder, back, again = tmp_path / "diffusers", tmp_path / "back.pt", tmp_path / "again"
    assert run("convert", published, folder, "--chunk-size", 8)[0] == 0
    assert AutoencoderDCV.from_pretrained(folder).config.chunk_size == 8
    assert run("convert", folder, back)[0] == 0
    state = torch.load(back, weights_only=True)["model_state_dict"]
    wanted = {k.removeprefix("model."): v for k, v in load_file(published).items()}
    assert state.keys() == wanted.keys() and all(torch.equal(state[k], wanted[k]) for k in state)
    assert run("convert", back, again)[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "back.pt", "dc-ae-v-tiny.safetensors", "diffusers"]


def test_what_is_there_stays(published, tmp_path):
    (tmp_path / "taken").mkdir()
    code, output = run("convert", published, tmp_path / "taken")
    assert code == 2 and "exists already" in output


@pytest.mark.parametrize("size", [0, 100, 100_000])
def test_a_truncated_file_is_named_and_nothing_is_written(published, tmp_path, size):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(published.read_bytes()[:size])
    code, output = run("convert", cut, tmp_path / "out")
    assert code == 2 and "cut.safetensors" in output and not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.iterdir() if ".part" in p.name]


def test_another_variant_says_which_key_and_shape(published, tmp_path):
    state = load_file(published)
    state["model.decoder.project_in.conv.bias"] = torch.zeros(7)
    save_file(state, tmp_path / "other.safetensors")
    code, output = run("convert", tmp_path / "other.safetensors", tmp_path / "out")
    assert code == 2 and "decoder.project_in.conv.bias" in output and "[7]" in output and "[32]" in output


def test_a_folder_that_is_neither(tmp_path):
    (tmp_path / "empty").mkdir()
    code, output = run("convert", tmp_path / "empty", tmp_path / "out")
    assert code == 2 and "transformer_t2v/config.json" in output
    code, output = run("convert", tmp_path / "empty", tmp_path / "out.pt")
    assert code == 2 and "no config.json" in output


def test_adapt_lists_what_is_ready():
    code, output = run("adapt", "--list")
    assert code == 0 and "demo_ae_adapt:" in output and "demo_autoencoder:" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "recipe is missing"),
        (("ae-adapt",), "--config is missing"),
        (("ae-adapt", "--config", "/no/such.yaml"), "/no/such.yaml"),
        (("dreambooth", "--config", "demo_ae_adapt"), "no recipe"),
        (("ae-adapt", "--config", "demo_autoencoder"), "is for the recipe autoencoder"),
        (("ae-adapt", "--config", "demo_ae_adapt", "--set", "phases.lora.stepz=3"), 'did you mean "steps"'),
    ],
)
def test_adapt_refuses_before_anything_is_loaded(arguments, message, capfd):
    code, output = run("adapt", *arguments)
    assert code == 2 and message in output + capfd.readouterr().err
