"""`vidaccel convert` and `vidaccel adapt`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vidaccel import demo
from vidaccel.autoencoders import AutoencoderDCV
from vidaccel.autoencoders.convert import read_published
from vidaccel.cli import app
from vidaccel.lora import config_folder

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


@pytest.mark.parametrize(
    ("source", "target", "options", "message"),
    [
        (
            "file",
            "out",
            ("--base", "x", "--link", "--image-to-video"),
            "--image-to-video, --base, --link are only for a publ",
        ),
        ("file", "out", ("--autoencoder", "x.pt"), "--autoencoder is only for a published folder as SOURCE, and"),
        ("alone", "out", ("--base", "x"), "--base is only for a whole model as SOURCE, and"),
        (
            "folder",
            "x.pt",
            ("--chunk-size", 7, "--base", "x"),
            "--base, --chunk-size are of no use when an AutoencoderDCV is",
        ),
        ("folder", "x.safetensors", ("--scaling-factor", 2), "is written as x.safetensors. Leave it out."),
    ],
)
def test_options_without_effect_are_refused(published, tmp_path, source, target, options, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "alone").mkdir()
    shutil.copy(published, tmp_path / "alone")
    place = published if source == "file" else tmp_path / source
    code, output = run("convert", place, tmp_path / target, *options)
    assert code == 2 and message in output and output.count("\n") == 1
    assert not (tmp_path / target).exists()


def test_what_the_source_is_instead(published, tmp_path):
    run("convert", published, tmp_path / "vae")
    for source, target, message in (
        (demo.path("demo-dc"), "out", "is an adapter (adapter.json), which Python's from_pretrained and `vidaccel gen"),
        (demo.path(), "out", "is a diffusers pipeline already (model_index.json)"),
        (
            tmp_path / "vae",
            "ae.txt",
            "AutoencoderDCV: to convert it to a published file, give that a name that ends in .pt",
        ),
        (published, "back.pt", "is no folder of an AutoencoderDCV: it is a file"),
        (
            tmp_path / "none",
            "out",
            f"{tmp_path / 'none'}: there is no such file or folder, and it is no hub id of",
        ),
        (
            "models/weights.pt",
            "out",
            "SOURCE is models/weights.pt: there is no such file or folder, and it is no hub",
        ),
        ("some/model", "out.pt", "SOURCE is some/model: there is no such file or folder."),
    ):
        code, output = run("convert", source, tmp_path / target)
        assert code == 2 and message in output and output.count("\n") == 1
        assert not (tmp_path / target).exists()


def test_a_file_that_is_no_checkpoint_by_its_name(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"a video")
    code, output = run("convert", tmp_path / "a.mp4", tmp_path / "out")
    assert code == 2 and "a.mp4 is no checkpoint by its name, which ends in .mp4: a DC-AE-V file ends in .pt" in output
    assert "damaged" not in output and output.count("\n") == 1


def test_a_chunk_that_cannot_be(published, tmp_path):
    code, output = run("convert", published, tmp_path / "out", "--chunk-size", 6)
    assert code == 2 and "chunk_size is 6" in output and output.count("\n") == 1


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that nobody can write to")
@pytest.mark.parametrize("target", ["/proc/zz", "/proc/zz.pt", "/proc/a/b/zz"])
def test_a_place_that_cannot_be_written(published, tmp_path, target):
    run("convert", published, tmp_path / "vae")
    code, output = run("convert", tmp_path / "vae" if target.endswith(".pt") else published, target)
    assert code == 2 and f"{target}: the folder /proc is not writable" in output and "Give another folder" in output
    assert "Errno" not in output and ".part" not in output


def test_a_folder_that_does_not_fit_its_config_is_not_written_back(published, tmp_path):
    """Neither a parameter without data nor one too many may come out."""
    run("convert", published, tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    for name, missing in (("decoder.conv_out.weight", True), ("extra.weight", False)):
        changed = {**state, "extra.weight": torch.zeros(2)}
        if missing:
            del changed[name]
        save_file(changed, file)
        code, output = run("convert", tmp_path / "vae", tmp_path / "back.pt")
        assert code == 2 and name in output and output.count("\n") == 1
    assert not (tmp_path / "back.pt").exists()


@pytest.mark.parametrize("name", ["back.pt", "back.safetensors"])
def test_the_type_is_kept_there_and_back(published, tmp_path, name):
    save_file({k: v.bfloat16() for k, v in load_file(published).items()}, tmp_path / "half.safetensors")
    assert run("convert", tmp_path / "half.safetensors", tmp_path / "vae")[0] == 0
    assert run("convert", tmp_path / "vae", tmp_path / name)[0] == 0
    back = read_published(tmp_path / name)
    wanted = {k.removeprefix("model."): v.bfloat16() for k, v in load_file(published).items()}
    assert back.keys() == wanted.keys()
    assert all(back[k].dtype == torch.bfloat16 and torch.equal(back[k], v) for k, v in wanted.items())


@pytest.mark.parametrize("name", ["adapt", "train"])
def test_adapt_lists_what_is_ready(name):
    code, output = run(name, "--list")
    assert code == 0 and "demo_ae_adapt:" in output and "demo_autoencoder:" in output
    listed = [line for line in output.splitlines() if ": " in line]
    assert len(listed) == len(list(config_folder().glob("*.yaml")))
    assert all(line.endswith(".") and "Every setting" not in line for line in listed)
    assert sum("ot tried at full size" in line for line in listed) > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "recipe is missing"),
        (("ae-adapt",), "--config is missing"),
        (("lra",), 'there is no recipe "lra": did you mean "lora"?'),
        (("ae-adapt", "--config", "/no/such.yaml"), "/no/such.yaml"),
        (("dreambooth", "--config", "demo_ae_adapt"), "no recipe"),
        (("ae-adapt", "--config", "demo_autoencoder"), "is for the recipe autoencoder"),
        (("ae-adapt", "--config", "demo_ae_adapt", "--set", "phases.lora.stepz=3"), 'did you mean "steps"'),
        (("autoencoder", "--config", "demo_autoencoder", "--encode-only"), "keeps no encodings"),
        (("ae-adapt", "--config", "demo_ae_adapt", "--encode-only", "--resume", "auto"), "leave --resume out"),
    ],
)
def test_adapt_refuses_before_anything_is_loaded(arguments, message, capfd):
    code, output = run("adapt", *arguments)
    assert code == 2 and message in output + capfd.readouterr().err
