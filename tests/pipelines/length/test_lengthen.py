"""`lengthen`: a LoRA with the attention that it was trained for, in real Wan pipelines at tiny sizes."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from gft_calls import loaded
from length_adapters import METHOD, write_length
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_wan import generate, make_pipe, make_transformer

import vidaccel
from vidaccel import LVSA, Radial, Riflex
from vidaccel.pipelines.length import LengthError, TrainedLength, facts_of_length, read_length, trained_length
from vidaccel.pipelines.length.rotary import RiflexRotary


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_pipe().save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(base):
    made = loaded(base)
    made.set_progress_bar_config(disable=True)
    return made


def test_it_is_the_lora_and_its_mask_and_leaves_nothing_behind(tmp_path, base, pipe):
    file = write_length(tmp_path, base, pipe.transformer)
    plain = generate(pipe)
    with vidaccel.lengthen(pipe, file, backend="reference") as handle:
        made, report = generate(pipe), handle.report()
    assert report.method == "radial" and {r.reason for r in report.records} == {"", "first layers"}
    assert not torch.allclose(made, plain)
    pipe.load_lora_weights(tmp_path, weight_name=file.name)
    with vidaccel.accelerate(pipe, METHOD, backend="reference"):
        assert torch.equal(generate(pipe), made)
    pipe.unload_lora_weights()
    assert torch.equal(generate(pipe), plain)
    with vidaccel.lengthen(pipe, file, backend="reference"):
        pass
    assert torch.equal(generate(pipe), plain) and not getattr(pipe.transformer, "peft_config", None)


def test_the_lora_counts_after_another_one_was_loaded(tmp_path, base, pipe):
    file = write_length(tmp_path, base, pipe.transformer, method=None)
    other = {name: 0 * matrix for name, matrix in load_file(file).items()}
    with vidaccel.lengthen(pipe, file):
        made = generate(pipe)
        pipe.load_lora_weights(other, adapter_name="style")
        assert torch.allclose(generate(pipe), made)


def test_the_lora_is_taken_out_of_weights_that_it_was_fused_into(tmp_path, base, pipe, caplog):
    file = write_length(tmp_path, base, pipe.transformer, method=None)
    plain = generate(pipe)
    with vidaccel.lengthen(pipe, file):
        made = generate(pipe)
        pipe.fuse_lora()
        assert torch.allclose(generate(pipe), made, atol=1e-5)
    assert torch.allclose(generate(pipe), plain, atol=1e-5)
    assert f"{file.name} was fused into the transformer" in caplog.text


def test_what_is_saved_would_not_load_again(tmp_path, base, pipe):
    file = write_length(tmp_path, base, pipe.transformer, method=None)
    with vidaccel.lengthen(pipe, file):
        for part in (pipe, pipe.transformer):
            with pytest.raises(RuntimeError, match=rf"cannot be saved .* it has {file.name} as a LoRA; call remove"):
                part.save_pretrained(tmp_path / "saved")
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(generate(loaded(tmp_path / "saved")), generate(pipe))


def test_loras_that_are_disabled_would_leave_it_out(tmp_path, base, pipe):
    file = write_length(tmp_path, base, pipe.transformer, method=None)
    pipe.load_lora_weights(load_file(file), adapter_name="style")
    pipe.disable_lora()
    with pytest.raises(LengthError, match=r"the LoRAs of the transformer are disabled.*enable_lora\(\)"):
        vidaccel.lengthen(pipe, file)
    assert list(pipe.transformer.peft_config) == ["style"]


@pytest.mark.parametrize("method", [METHOD, None])
def test_once_alone_and_restored_where_the_handle_is_lost(tmp_path, base, pipe, method):
    file = write_length(tmp_path, base, pipe.transformer, method=method, riflex=Riflex(2, 1))
    plain, own = generate(pipe), pipe.transformer.rope
    backend = {"backend": "reference"} if method is not None else {}
    for _ in range(2):
        vidaccel.lengthen(pipe, file, **backend)
        with pytest.raises(
            RuntimeError, match=r"lengthened already: call remove\(\) on its handle, or vidaccel.restore"
        ):
            vidaccel.lengthen(pipe, file, **backend)
        copied = copy.deepcopy(pipe)
        vidaccel.restore(pipe)
        assert torch.equal(generate(pipe), plain) and not getattr(pipe.transformer, "peft_config", None)
        assert pipe.transformer.rope is own and not pipe.transformer._forward_pre_hooks
        assert not torch.allclose(generate(copied), plain)
        vidaccel.restore(copied)
        assert torch.equal(generate(copied), plain)


def test_restored_through_a_pipeline_that_shares_the_transformer_all_of_it_goes(tmp_path, base, pipe):
    file = write_length(tmp_path, base, pipe.transformer, method=None, riflex=Riflex(2, 1))
    plain = generate(pipe)
    vidaccel.lengthen(pipe, file)
    made = generate(pipe)
    alone = type(pipe).from_pipe(pipe, transformer=copy.deepcopy(pipe.transformer))
    vidaccel.restore(alone)
    assert torch.equal(generate(pipe), made)
    vidaccel.restore(type(pipe).from_pipe(pipe))
    assert torch.equal(generate(pipe), plain) and not pipe.transformer._forward_pre_hooks
    vidaccel.lengthen(pipe, file).remove()


@pytest.mark.parametrize("method", [METHOD, LVSA(reference=2), None])
@pytest.mark.parametrize("riflex", [None, Riflex(2, 1)])
def test_the_header_says_it_all(method, riflex):
    trained = TrainedLength(method, 0.25, 2, 5, riflex, "a.safetensors")
    facts = json.loads(json.dumps({"recipe": "length", "length": facts_of_length(trained)}))
    assert trained_length(facts, "a.safetensors") == trained
    assert trained_length({**facts, "recipe": "lora"}, "a") is None


def test_riflex_comes_with_the_file(tmp_path, base, pipe):
    file = write_length(tmp_path, base, pipe.transformer, method=None, riflex=Riflex(2, 1))
    own = pipe.transformer.rope
    with vidaccel.lengthen(pipe, file) as handle:
        assert isinstance(pipe.transformer.rope, RiflexRotary) and handle.report() is None
    assert pipe.transformer.rope is own


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("svg2", "method radial then, svg2 now"),
        ("dense", "method radial then, dense now"),
        (dataclasses.replace(METHOD, decay=0.5), "this is another: decay 0.3 then, 0.5 now. Leave"),
        (Radial(16, schedule=METHOD.schedule), "block_size 8 then, 16 now; decay 0.3 then, 0.2 now; sink False then"),
        (dataclasses.replace(METHOD, schedule=vidaccel.DenseSchedule(first_layers=2)), "first_layers 1 then, 2 now"),
    ],
)
def test_another_attention_is_refused_with_the_difference(tmp_path, base, pipe, asked, words):
    file = write_length(tmp_path, base, pipe.transformer)
    with pytest.raises(LengthError, match=words):
        vidaccel.lengthen(pipe, file, method=asked)
    assert not getattr(pipe.transformer, "peft_config", None)
    vidaccel.lengthen(pipe, file, method=METHOD).remove()


@pytest.mark.parametrize(
    ("method", "error", "words"),
    [
        (METHOD, RuntimeError, r"with qk='int8': backend 'triton' runs on cuda"),
        (None, LengthError, "precision is 'int8': .* trained with dense attention; leave precision out"),
    ],
)
def test_a_precision_that_cannot_be_had_is_refused_and_the_lora_taken_out(
    tmp_path, base, pipe, monkeypatch, method, error, words
):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    file = write_length(tmp_path, base, pipe.transformer, method=method)
    with pytest.raises(error, match=words):
        vidaccel.lengthen(pipe, file, precision="int8")
    assert not getattr(pipe.transformer, "peft_config", None)


def test_longer_videos_than_those_of_the_training_are_refused(tmp_path, base, pipe):
    file = write_length(tmp_path, base, pipe.transformer, frames=1)
    with vidaccel.lengthen(pipe, file), pytest.raises(LengthError, match=r"latent frames, and .* was trained up to 1"):
        generate(pipe)


def test_files_that_cannot_be_used_are_refused(tmp_path, base, pipe):
    file = write_length(tmp_path, base, pipe.transformer)
    other = loaded(base)
    with pytest.raises(LengthError, match="cannot be told"):
        vidaccel.lengthen(make_pipe(), file)
    save_dir = tmp_path / "other"
    make_pipe(transformer=make_transformer(5)).save_pretrained(save_dir)
    with pytest.raises(LengthError, match="has other weights"):
        vidaccel.lengthen(loaded(save_dir), file)
    with pytest.raises(LengthError, match="no LoRA that can be read"):
        read_length(tmp_path / "gone")
    plain = tmp_path / "plain.safetensors"
    save_file({"a": torch.zeros(1)}, plain)
    with pytest.raises(LengthError, match="not written by this package's trainer"):
        read_length(plain)
    save_file({"a": torch.zeros(1)}, plain, {"vidaccel": json.dumps({"recipe": "length", "length": {"method": "no"}})})
    with pytest.raises(LengthError, match="header of plain.safetensors cannot be used"):
        read_length(plain)
    with pytest.raises(LengthError, match="give one for each transformer"):
        vidaccel.lengthen(other, [file, file])


def test_half_a_lora_is_refused(tmp_path, base, pipe):
    """diffusers would make up the other half."""
    before = generate(pipe)
    file = write_length(tmp_path, base, make_transformer())
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    half = next(name for name in tensors if "lora_A" in name)
    del tensors[half]
    save_file(tensors, file, header)
    with pytest.raises(LengthError, match=rf"^{file} has \S+lora_B\.weight without {half}, and a layer needs both"):
        vidaccel.lengthen(pipe, file)
    assert generate(pipe).equal(before)
