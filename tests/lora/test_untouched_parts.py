"""What is not trained is in the result, and in the videos of a validation, as the base has it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline
from lora_runs import recipe, write

from vidaccel.autoencoders import AutoencoderDCV
from vidaccel.lora.backbones.base import ModelOptions
from vidaccel.lora.backbones.folders import _without_variant, write_pipeline
from vidaccel.lora.backbones.wan import WanBackbone
from vidaccel.lora.backbones.wan_own import WanModel
from vidaccel.pipelines.deep_compression.text_to_video import DCVideoGenPipeline

STAGE = {"two stages": "low_noise"}


def files_of(folder: Path, part: str) -> dict[str, bytes]:
    """The files of a component, without where its config says that it was loaded from."""
    found = {file.name: file.read_bytes() for file in (folder / part).iterdir()}
    for name in [name for name in found if name.endswith(".json")]:
        content = json.loads(found[name])
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            found[name] = json.dumps(content, indent=2).encode() + b"\n"
    return found


def index_of(folder: Path) -> dict:
    return {k: v for k, v in json.loads((folder / "model_index.json").read_text()).items() if k != "_name_or_path"}


@pytest.mark.parametrize("kind", ["text", "first frame", "two stages", "timestep for each token"])
def test_a_pipeline_with_all_weights_trained(tmp_path, wan_bases, kind):
    """To the byte: in bfloat16 autoencoder and text encoder were rounded with the transformer."""
    base = wan_bases[kind]
    backbone = WanModel(str(base), ModelOptions(dtype=torch.bfloat16, stage=STAGE.get(kind)))
    backbone.save(backbone.transformer(), tmp_path / "pipeline")
    index = index_of(base)
    assert index_of(tmp_path / "pipeline") == index
    parts = [name for name, entry in index.items() if isinstance(entry, list) and entry[0]]
    assert {"vae", "text_encoder", "tokenizer"} < set(parts)
    for part in parts:
        if part not in ("scheduler", backbone.part):
            assert files_of(tmp_path / "pipeline", part) == files_of(base, part), part
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.vae.dtype == torch.float32 and not [part for part in parts if getattr(pipe, part) is None]
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_a_pipeline_moved_to_another_autoencoder(tmp_path, text_base, autoencoder_folder):
    backbone = WanBackbone(str(text_base), str(autoencoder_folder), dtype=torch.bfloat16)
    backbone.save(backbone.student(), tmp_path / "pipeline")
    for part in ("text_encoder", "tokenizer"):
        assert files_of(tmp_path / "pipeline", part) == files_of(text_base, part)
    pipe = DCVideoGenPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.text_encoder.dtype == torch.float32 and pipe.tokenizer is not None


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "5KB"}])
def test_an_autoencoder_of_which_there_is_a_variant_alone(tmp_path, text_base, autoencoder_folder, shards):
    """No other part of the pipeline has that variant, so that diffusers looked for weights that were not there."""
    half = AutoencoderDCV.from_pretrained(autoencoder_folder).half()
    half.save_pretrained(tmp_path / "fp16", variant="fp16", **shards)
    backbone = WanBackbone(str(text_base), str(tmp_path / "fp16"))
    backbone.save(backbone.student(), tmp_path / "pipeline")
    vae = DCVideoGenPipeline.from_pretrained(tmp_path / "pipeline").vae.state_dict()
    assert all(torch.equal(value.float(), vae[name].float()) for name, value in half.state_dict().items())
    assert len(list((tmp_path / "pipeline" / "vae").iterdir())) == len(list((tmp_path / "fp16").iterdir()))


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbf{}", b"{", b"[" * 99999, b"\xff"], ids=["mark", "cut", "deep", "bytes"]
)
def test_a_file_of_a_base_that_no_reader_of_json_takes_is_copied(tmp_path, text_base, content):
    """It ended a training when all steps were made."""
    base = tmp_path / "base"
    shutil.copytree(text_base, base)
    (base / "tokenizer" / "more.json").write_bytes(content)
    backbone = WanModel(str(base), ModelOptions())
    backbone.save(backbone.transformer(), tmp_path / "pipeline")
    assert (tmp_path / "pipeline" / "tokenizer" / "more.json").read_bytes() == content


@pytest.mark.parametrize(("text", "problem"), [("[]", "it must be an object, and is a list"), ("{}", "weight_map")])
def test_an_index_of_weights_that_is_none_is_named(tmp_path, text, problem):
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"")
    (tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(text)
    with pytest.raises(OSError, match=rf"index\.fp16\.json cannot be read as an index of weights: .*{problem}"):
        _without_variant(tmp_path)


def test_a_base_of_the_hub_is_fetched_for_it(tmp_path, text_base, monkeypatch):
    """Its text encoder may never have been here: all captions were in the cache."""
    asked = []
    load = DiffusionPipeline.load_config.__func__
    monkeypatch.setattr(DiffusionPipeline, "load_config", classmethod(lambda cls, _: load(cls, text_base)))
    monkeypatch.setattr(
        DiffusionPipeline, "download", lambda base, **without: asked.append((base, set(without))) or str(text_base)
    )
    pipe = DiffusionPipeline.from_pretrained(text_base, vae=None, text_encoder=None, tokenizer=None)
    write_pipeline(pipe, tmp_path / "pipeline", "someone/something", ["vae", "text_encoder", "tokenizer"])
    [(base, without)] = asked
    assert base == "someone/something" and {"transformer", "scheduler"} <= without and "vae" not in without
    assert files_of(tmp_path / "pipeline", "vae") == files_of(text_base, "vae")


@pytest.mark.parametrize("on", [True, False])
def test_videos_of_a_validation_are_decoded_in_tiles_too(tmp_path, text_base, on):
    """Only encoding was: a clip that was trained on in tiles ran out of memory when it was shown."""
    made = recipe(write(tmp_path, text_base), [f"model.autoencoder_tiling={str(on).lower()}"])
    assert made.backbone.sampler(made.transformer()).vae.use_tiling is on


def test_videos_of_a_validation_are_decoded_by_the_autoencoder_itself(tmp_path, text_base):
    """It was rounded to `model.dtype`, and only then made float32."""
    made = recipe(write(tmp_path, text_base, model={"dtype": "bfloat16"}, loop={"mixed_precision": "bf16"}))
    pipe = made.backbone.sampler(made.backbone.transformer())
    whole = AutoencoderKLWan.from_pretrained(text_base, subfolder="vae").state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in pipe.vae.state_dict().items())
    assert pipe.transformer.dtype == torch.bfloat16
