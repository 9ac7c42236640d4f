"""Adapter-only weights: loading them onto their base model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_adapter import TINY, write_adapter

from vidaccel import AutoencoderDCV, DCGenPipeline, DCVideoGenImageToVideoPipeline, DCVideoGenPipeline, demo
from vidaccel.generation.models.inspected import inspect_model
from vidaccel.lora.backbones import open_model
from vidaccel.lora.config import ConfigError
from vidaccel.pipelines.deep_compression.adapter_folder import (
    FACTS_FILE,
    FULL_FILE,
    LORA_FILE,
    AdapterError,
    read_facts,
)
from vidaccel.pipelines.files.weight_files import transformer_files


@pytest.mark.parametrize("lora", [True, False])
def test_the_base_with_what_was_trained_and_the_lora_merged(tmp_path, lora):
    wanted = write_adapter(tmp_path / "adapter", lora=lora).state_dict()
    pipe = DCVideoGenPipeline.from_pretrained(tmp_path / "adapter")
    made = pipe.transformer.state_dict()
    assert made.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(made[name], value, atol=1e-5, rtol=1e-5)
    pipe.set_progress_bar_config(disable=True)
    video = pipe("a red circle", height=20, width=30, num_frames=5, num_inference_steps=2, output_type="pt").frames
    assert video.shape == (1, 5, 3, 20, 30) and video.isfinite().all()


def test_where_its_parts_go(tmp_path):
    write_adapter(tmp_path / "adapter")
    pipe = DCVideoGenPipeline.from_pretrained(tmp_path / "adapter", device_map="meta")
    assert {pipe.transformer.device.type, pipe.vae.device.type, pipe.text_encoder.device.type} == {"meta"}
    with pytest.raises(AdapterError, match="device_map is 'balanced', give a device"):
        DCVideoGenPipeline.from_pretrained(tmp_path / "adapter", device_map="balanced")
    with pytest.raises(AdapterError, match="load it without quantization_config"):
        DCVideoGenPipeline.from_pretrained(tmp_path / "adapter", quantization_config=object())


def test_saved_whole_it_is_the_same(tmp_path):
    write_adapter(tmp_path / "adapter")
    pipe = DCVideoGenPipeline.from_pretrained(tmp_path / "adapter")
    pipe.save_pretrained(tmp_path / "whole")
    again = DCVideoGenPipeline.from_pretrained(tmp_path / "whole")
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(again.transformer.state_dict()[name], value)


def test_dtypes_of_the_parts(tmp_path):
    write_adapter(tmp_path / "adapter")
    dtypes = {"default": torch.bfloat16, "vae": torch.float32}
    pipe = DCVideoGenPipeline.from_pretrained(tmp_path / "adapter", dtype=dtypes)
    assert pipe.vae.dtype == torch.float32 and pipe.text_encoder.dtype == torch.bfloat16
    block = pipe.transformer.blocks[0]
    assert block.attn1.to_q.weight.dtype == pipe.transformer.patch_embedding.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_a_dtype_may_be_a_name(tmp_path, argument):
    write_adapter(tmp_path / "adapter")
    pipe = DCVideoGenPipeline.from_pretrained(tmp_path / "adapter", **{argument: "bfloat16"})
    assert pipe.vae.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert pipe.transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    names = {"default": "bfloat16", "vae": "float32"}
    pipe = DCVideoGenPipeline.from_pretrained(tmp_path / "adapter", **{argument: names})
    assert pipe.vae.dtype == torch.float32 and pipe.text_encoder.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=rf"{argument}='bf16' is no dtype: give one of float32, bfloat16"):
        DCVideoGenPipeline.from_pretrained(tmp_path / "adapter", **{argument: "bf16"})


def test_another_autoencoder_may_be_given(tmp_path):
    write_adapter(tmp_path / "adapter")
    AutoencoderDCV(**{**TINY, "chunk_size": 16}).save_pretrained(tmp_path / "other")
    pipe = DCVideoGenPipeline.from_pretrained(tmp_path / "adapter", autoencoder=tmp_path / "other")
    assert pipe.vae.config.chunk_size == 16


def test_what_its_configs_say(tmp_path):
    write_adapter(tmp_path / "text")
    facts = inspect_model(str(tmp_path / "text"))
    assert facts.pipeline_class == "DCVideoGenPipeline" and facts.makes_any_size
    assert (facts.size_factor, facts.frame_factor, facts.patch, facts.pad_frames) == (4, 4, (1, 1, 1), 0)
    assert facts.layout(9, 40, 70).tokens == 3 * 12 * 20  # made as 12 frames of 80x48
    write_adapter(tmp_path / "image", in_channels=20)
    assert inspect_model(str(tmp_path / "image")).pipeline_class == DCVideoGenImageToVideoPipeline.__name__


def test_an_adapter_to_another_model(tmp_path):
    config = dict(WanTransformer3DModel.load_config(demo.path(), subfolder="transformer"))
    write_adapter(tmp_path / "deeper", transformer={**config, "in_channels": 8, "out_channels": 8, "num_layers": 40})
    with pytest.raises(
        AdapterError, match=r"40 layers, and .* has 6: give the model it was made from, demo, with base="
    ):
        DCVideoGenPipeline.from_pretrained(tmp_path / "deeper")
    write_adapter(tmp_path / "wider", transformer={**config, "in_channels": 9, "out_channels": 8})
    with pytest.raises(
        AdapterError, match=r"patch_embedding.weight is \[192, 8, 1, 1, 1\] in the adapter and \[192, 9"
    ):
        DCVideoGenPipeline.from_pretrained(tmp_path / "wider")


@pytest.mark.parametrize("hashed", [True, False])
def test_a_base_that_was_adapted_already(tmp_path, hashed):
    """It has as many layers, and weights into which the LoRA was merged once."""
    facts = {"base_hash": transformer_files(str(demo.path()))} if hashed else {}
    write_adapter(tmp_path / "adapter", **facts)
    DCVideoGenPipeline.from_pretrained(tmp_path / "adapter").save_pretrained(tmp_path / "whole")
    said = (
        "was trained on demo, and the transformer of .*whole has other weights" if hashed else "already: give the mod"
    )
    with pytest.raises(AdapterError, match=said):
        DCVideoGenPipeline.from_pretrained(tmp_path / "adapter", base=tmp_path / "whole")
    DCVideoGenPipeline.from_pretrained(tmp_path / "adapter", base=demo.path())


def test_a_base_with_weights_of_a_variant_alone(tmp_path):
    """They are of the same model, rounded, and have another hash."""
    write_adapter(tmp_path / "adapter", base_hash=transformer_files(str(demo.path())))
    shutil.copytree(demo.path(), tmp_path / "base")
    half = WanTransformer3DModel.from_pretrained(demo.path(), subfolder="transformer", dtype=torch.float16)
    shutil.rmtree(tmp_path / "base" / "transformer")
    half.save_pretrained(tmp_path / "base" / "transformer", variant="fp16")
    given = {"base": tmp_path / "base", "variant": "fp16"}
    assert DCVideoGenPipeline.from_pretrained(tmp_path / "adapter", **given).transformer.config.in_channels == 8


def test_the_built_in_adapter_says_its_base():
    assert read_facts(demo.path(demo.DC))["base_hash"] == transformer_files(str(demo.path()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda name: None if ".blocks.0." in name else name,
            r"lacks blocks\.0\.attn1\.to_k, blocks\.0\.\S+ and \d+ more: it was",
        ),
        (
            lambda name: name.replace("blocks.5.attn1.to_q", "blocks.5.attnX.to_q"),
            r"lacks blocks\.5\.attn1\.to_q: it was",
        ),
        (lambda name: f"other.{name}", "holds no LoRA of a transformer"),
    ],
)
def test_a_lora_that_does_not_fit_its_layers(tmp_path, change, message):
    """peft warns of it alone, and the layers do nothing."""
    shutil.copytree(demo.path(demo.DC), tmp_path / "adapter")
    file = tmp_path / "adapter" / LORA_FILE
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    changed = {change(name): value for name, value in load_file(file).items()}
    save_file({name: value for name, value in changed.items() if name}, file, metadata)
    with pytest.raises(AdapterError, match=message):
        DCVideoGenPipeline.from_pretrained(tmp_path / "adapter")


def test_damaged_files_are_told_of_before_the_base_is_loaded(tmp_path, monkeypatch):
    write_adapter(tmp_path / "adapter")
    monkeypatch.setattr(WanTransformer3DModel, "from_pretrained", lambda *a, **k: pytest.fail("the base is loaded"))
    for name in (FULL_FILE, LORA_FILE):
        file = tmp_path / "adapter" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:2000])
        with pytest.raises(AdapterError, match=f"{name} cannot be read .*: write or download the adapter again"):
            DCVideoGenPipeline.from_pretrained(tmp_path / "adapter")
        file.unlink()
        with pytest.raises(AdapterError, match=f"{name} cannot be read"):
            DCVideoGenPipeline.from_pretrained(tmp_path / "adapter")
        file.write_bytes(whole)
    facts = tmp_path / "adapter" / FACTS_FILE
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "transformer": {}}))
    with pytest.raises(AdapterError, match="does not say the num_layers of the transformer"):
        DCVideoGenPipeline.from_pretrained(tmp_path / "adapter")


def test_the_class_of_another_kind_of_adapter(tmp_path):
    write_adapter(tmp_path / "text")
    with pytest.raises(AdapterError, match="is an adapter for text to video: load it with DCVideoGenPipeline"):
        DCVideoGenImageToVideoPipeline.from_pretrained(tmp_path / "text")
    write_adapter(tmp_path / "image", in_channels=20)
    with pytest.raises(AdapterError, match="for image to video: load it with DCVideoGenImageToVideoPipeline"):
        DCVideoGenPipeline.from_pretrained(tmp_path / "image")


def test_the_folder_of_a_training_stands_for_its_model(tmp_path, caplog):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("recipe: ae_adapt\n")
    for load in (DCVideoGenPipeline.from_pretrained, DCGenPipeline.from_pretrained):
        with pytest.raises(ValueError, match="is the folder of a training that has written no model"):
            load(run)
    write_adapter(run / "checkpoints" / "step_00000001" / "adapter")
    with caplog.at_level("INFO", "vidaccel"):
        pipe = DCVideoGenPipeline.from_pretrained(run)
    assert "the folder of a training: its checkpoints/step_00000001/adapter is used" in caplog.text
    pipe.save_pretrained(run / "pipeline")
    with caplog.at_level("INFO", "vidaccel"):
        assert DCVideoGenPipeline.from_pretrained(str(run)).transformer is not None
    assert "the folder of a training: its pipeline is used" in caplog.text


def test_a_base_that_is_gone_is_told_with_the_adapter(tmp_path):
    """And not as a download that failed."""
    write_adapter(tmp_path / "adapter", base="/models/gone")
    words = "adapter was made for the base in /models/gone, which is not there: give its folder with base="
    with pytest.raises(AdapterError, match=words):
        DCVideoGenPipeline.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=words):
        open_model(str(tmp_path / "adapter"), "lora")
    with pytest.raises(AdapterError, match="base is nowhere, which is no folder here and no hub id"):
        DCVideoGenPipeline.from_pretrained(tmp_path / "adapter", base="nowhere")
    assert DCVideoGenPipeline.from_pretrained(tmp_path / "adapter", base="demo").transformer is not None


def test_an_autoencoder_of_other_channels_is_told_before_the_base_is_read(tmp_path, monkeypatch):
    write_adapter(tmp_path / "adapter")
    AutoencoderDCV(**{**TINY, "latent_channels": 4}).save_pretrained(tmp_path / "other")
    monkeypatch.setattr(WanTransformer3DModel, "from_pretrained", None)
    with pytest.raises(AdapterError, match="for an autoencoder of 8 latent channels, and this one has 4"):
        DCVideoGenPipeline.from_pretrained(tmp_path / "adapter", autoencoder=tmp_path / "other")
    vae = AutoencoderDCV.from_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="for an autoencoder of 8 latent channels"):
        DCVideoGenPipeline.from_pretrained(tmp_path / "adapter", vae=vae)


def test_an_adapter_for_videos_is_none_for_pictures(tmp_path):
    write_adapter(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="adapter is an adapter for videos: load it with DCVideoGenPipeline"):
        DCGenPipeline.from_pretrained(tmp_path / "adapter")
    facts = json.loads((tmp_path / "adapter" / FACTS_FILE).read_text())
    facts["transformer"]["patch_size"] = 1
    (tmp_path / "adapter" / FACTS_FILE).write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="adapter is a DCGenPipeline; lora takes WanPipeline"):
        open_model(str(tmp_path / "adapter"), "lora")


def test_the_variant_is_that_of_the_autoencoder_too(tmp_path):
    write_adapter(tmp_path / "adapter")
    vae = AutoencoderDCV.from_pretrained(tmp_path / "adapter" / "vae")
    vae.save_pretrained(tmp_path / "both")
    vae.decoder.conv_out.bias.data.fill_(7.0)
    vae.save_pretrained(tmp_path / "both", variant="fp16")
    vae.save_pretrained(tmp_path / "one", variant="fp16")
    options = {"text_encoder": None, "tokenizer": None}
    for folder, variant, is_variant in (("both", None, False), ("both", "fp16", True), ("one", None, True)):
        place = {"autoencoder": tmp_path / folder, "variant": variant}
        pipe = DCVideoGenPipeline.from_pretrained(
            tmp_path / "adapter", base=_with_variant(tmp_path), **place, **options
        )
        assert bool((pipe.vae.decoder.conv_out.bias == 7).all()) == is_variant


def _with_variant(folder: Path) -> Path:
    """The built-in model, whose transformer is there in a variant, too."""
    base = folder / "base"
    if not base.exists():
        shutil.copytree(demo.path(), base)
        WanTransformer3DModel.from_pretrained(base / "transformer").save_pretrained(
            base / "transformer", variant="fp16"
        )
    return base


def test_a_file_of_half_precision_runs_in_that_of_the_base(tmp_path):
    """Without a dtype the base is loaded in float32, and so is an autoencoder from a folder."""
    from vidaccel.autoencoders.convert import write_published_file

    write_adapter(tmp_path / "adapter")
    AutoencoderDCV.from_pretrained(tmp_path / "adapter" / "vae", dtype=torch.float16).save_pretrained(tmp_path / "half")
    write_published_file(tmp_path / "half", tmp_path / "half.pt")
    for place in (tmp_path / "half", tmp_path / "half.pt"):
        pipe = DCVideoGenPipeline.from_pretrained(tmp_path / "adapter", autoencoder=place)
        assert pipe.vae.dtype == pipe.transformer.dtype == torch.float32
    pipe = DCVideoGenPipeline.from_pretrained(tmp_path / "adapter", autoencoder=place, dtype=torch.bfloat16)
    assert pipe.vae.dtype == torch.bfloat16


def test_an_adapter_without_its_head(tmp_path):
    """It would make a video of a head that starts at zero."""
    write_adapter(tmp_path / "adapter")
    file = tmp_path / "adapter" / FULL_FILE
    save_file({name: value for name, value in load_file(file).items() if name.startswith("patch")}, file)
    with pytest.raises(AdapterError, match=r"lacks proj_out.bias, proj_out.weight, .* download the adapter again"):
        DCVideoGenPipeline.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("content", ["{", '{"base": "demo"}'])
def test_facts_that_cannot_be_read(tmp_path, content):
    write_adapter(tmp_path / "adapter")
    (tmp_path / "adapter" / FACTS_FILE).write_text(content)
    with pytest.raises(AdapterError, match=r"adapter\.json (cannot be read|lacks autoencoder, lora, transformer)"):
        DCVideoGenPipeline.from_pretrained(tmp_path / "adapter")


def test_the_autoencoder_is_found_from_the_folder_of_the_adapter(tmp_path):
    write_adapter(tmp_path / "run" / "adapter", autoencoder="../pipeline/vae")
    (tmp_path / "run" / "adapter" / "vae").rename(tmp_path / "vae")
    with pytest.raises(
        AdapterError, match=r"the autoencoder in \.\./pipeline/vae, which is not there: .* autoencoder="
    ):
        DCVideoGenPipeline.from_pretrained(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "pipeline").mkdir()
    (tmp_path / "vae").rename(tmp_path / "run" / "pipeline" / "vae")
    (tmp_path / "run").rename(tmp_path / "moved")
    pipe = DCVideoGenPipeline.from_pretrained(tmp_path / "moved" / "adapter")
    assert pipe.vae.config.latent_channels == 8


def test_the_built_in_lora_is_one_of_diffusers():
    """What `load_lora_weights` of a stock pipeline reads, with all of its layers."""
    pipe = WanPipeline.from_pretrained(demo.path())
    pipe.load_lora_weights(demo.path(demo.DC), weight_name=LORA_FILE)
    loaded = get_peft_model_state_dict(pipe.transformer, adapter_name="default_0")
    assert len(loaded) == len(load_file(demo.path(demo.DC) / LORA_FILE)) > 0
    assert pipe.transformer.peft_config["default_0"].lora_alpha == 64


def test_components_that_are_given_are_used(tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    write_adapter(tmp_path / "adapter")
    vae, scheduler = AutoencoderDCV(**{**TINY, "chunk_size": 16}), FlowMatchEulerDiscreteScheduler()
    pipe = DCVideoGenPipeline.from_pretrained(tmp_path / "adapter", vae=vae, scheduler=scheduler)
    assert pipe.vae is vae and pipe.scheduler is scheduler
    with pytest.raises(AdapterError, match="is an adapter, which changes the transformer of its base: .*base="):
        DCVideoGenPipeline.from_pretrained(tmp_path / "adapter", transformer=pipe.transformer)
    with pytest.raises(ValueError, match="autoencoder= and vae= both give the autoencoder"):
        DCVideoGenPipeline.from_pretrained(tmp_path / "adapter", vae=vae, autoencoder=tmp_path)


def test_an_autoencoder_as_a_published_file(tmp_path):
    from vidaccel.autoencoders.convert import write_published_file

    write_adapter(tmp_path / "adapter")
    write_published_file(tmp_path / "adapter" / "vae", tmp_path / "files" / "dc-ae-v-1.0-f4t4c8.pt")
    given = {"autoencoder": tmp_path / "files", "autoencoder_config": {"chunk_size": 8, "scaling_factor": 0.5}}
    pipe = DCVideoGenPipeline.from_pretrained(tmp_path / "adapter", **given)
    assert (pipe.vae.config.chunk_size, pipe.vae.config.scaling_factor) == (8, 0.5)
    with pytest.raises(ValueError, match=r"autoencoder_config \(chunk_size\) is for a DC-AE-V file, and .*vae has its"):
        DCVideoGenPipeline.from_pretrained(tmp_path / "adapter", autoencoder_config={"chunk_size": 8})
