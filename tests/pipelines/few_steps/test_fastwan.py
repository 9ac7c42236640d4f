"""FastWan models as folders of diffusers: what is written, what runs, and what is refused before that."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline
from fastwan_models import write_fastwan
from safetensors import safe_open
from safetensors.torch import load_file
from sla_models import demo_parts
from tiny_wan import make_transformer
from vsa_models import as_published, write_gates

import vidaccel
from vidaccel import VSA, DMDScheduler
from vidaccel.autoencoders.checkpoint_file import CheckpointError
from vidaccel.pipelines.acceleration.vsa_gates import published_density
from vidaccel.pipelines.deep_compression.published_files import LayoutError
from vidaccel.pipelines.few_steps import convert_fastwan
from vidaccel.pipelines.files.weight_files import WEIGHTS


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    shape = {"in_channels": 8, "out_channels": 8, "text_dim": 64}
    WanPipeline(**demo_parts(), transformer=make_transformer(**shape)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory, base):
    return as_published(write_gates(tmp_path_factory.mktemp("published") / "FastWan", base))


@pytest.mark.parametrize("link", [False, True])
def test_a_folder_that_diffusers_loads_and_accelerate_knows(published, tmp_path, link, caplog):
    folder = convert_fastwan(published, tmp_path / "made", link=link)
    assert (folder / "transformer" / WEIGHTS).is_symlink() == (folder / "vae").is_symlink() == link
    with caplog.at_level(logging.WARNING):
        pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is WanPipeline and type(pipe.scheduler) is DMDScheduler
    pipe.set_progress_bar_config(disable=True)
    call = {"num_frames": 17, "height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 1.0}

    def latents() -> torch.Tensor:
        return pipe("a dot", **call, generator=torch.Generator().manual_seed(0), output_type="latent").frames

    dense = latents()
    with vidaccel.accelerate(pipe) as handle:
        assert handle.method == VSA(density=0.2)
        sparse = latents()
        records = handle.report().records
    assert len(records) == 3 * 3 and not any(record.reason for record in records)
    assert not sparse.equal(dense) and latents().equal(dense)
    defaults = json.loads((folder / "generation_defaults.json").read_text())
    assert defaults == {"frames": 81, "height": 480, "width": 832, "steps": 3, "guidance_scale": 1.0}


def test_densities(published, tmp_path):
    folder = convert_fastwan(published, tmp_path / "made", density=0.5)
    with vidaccel.accelerate(WanPipeline.from_pretrained(folder), "vsa") as handle:
        assert handle.method == VSA(density=0.5)
    with pytest.raises(ValueError, match="VSA density is 2"):
        convert_fastwan(published, tmp_path / "other", density=2)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("heads", "density"), [(12, 0.2), (24, 0.2), (40, 0.1)])
def test_densities_of_the_published_sizes(heads, density):
    """Of 1.3B, 5B and 14B: 1 - VSA_sparsity of examples/distill of FastVideo."""
    assert published_density({"num_attention_heads": heads, "attention_head_dim": 128}) == density


def test_a_revision(base, published, tmp_path, monkeypatch):
    asked = []

    def download(repository, **options):
        asked.append((repository, options["revision"]))
        return str(published)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    convert_fastwan("some/FastWan", tmp_path / "made", revision="v2")
    assert asked == [("some/FastWan", "v2")]
    with pytest.raises(CheckpointError, match="revision is 'v2', and .* is a folder here: leave it out"):
        convert_fastwan(published, tmp_path / "other", revision="v2")


def test_one_without_gates_is_dense(base, tmp_path):
    """FastWan 2.2 5B FullAttn."""
    source = shutil.copytree(base, tmp_path / "FullAttn")
    index = json.loads((source / "model_index.json").read_text()) | {"expand_timesteps": True}
    (source / "model_index.json").write_text(json.dumps(index))
    folder = convert_fastwan(as_published(source), tmp_path / "made")
    assert "_trained_for" not in json.loads((folder / "transformer/config.json").read_text())
    assert json.loads((folder / "generation_defaults.json").read_text())["frames"] == 121
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert pipe.config.expand_timesteps
    with vidaccel.accelerate(pipe, min_tokens=0) as handle:
        pipe.set_progress_bar_config(disable=True)
        pipe(
            "a dot", num_frames=5, height=64, width=64, num_inference_steps=3, guidance_scale=1.0, output_type="latent"
        )
        assert {record.reason for record in handle.report().records} == {"distilled to few steps"}
        assert any("trained with attention to all" in note for note in handle.report().notes)
    with pytest.raises(CheckpointError, match="has no gates .*: leave density out"):
        convert_fastwan(source, tmp_path / "other", density=0.2)


def _of_class(folder):
    as_published(folder, "WanImageToVideoPipeline")


def _two_stages(folder):
    shutil.copytree(folder / "transformer", folder / "transformer_2")


def _without_autoencoder(folder):
    shutil.rmtree(folder / "vae")


def _image_to_video(folder):
    path = folder / "transformer/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"in_channels": 20}))


def _other_size(folder):
    path = folder / "transformer/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ffn_dim": 128}))


def _more_layers(folder):
    path = folder / "transformer/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 4}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_of_class, "is a WanImageToVideoPipeline: a FastWan model is a WanDMDPipeline"),
        (_two_stages, "has two transformers: a FastWan model has one"),
        (_without_autoencoder, "lacks vae: give the whole model"),
        (_image_to_video, "takes 20 channels and makes 8: text to video takes as many"),
        (_other_size, r"blocks.0.ffn.net.0.proj.bias of .* is \[64\], and its config needs \[128\]"),
        (_more_layers, r"lacks \d+ tensors, such as blocks.3"),
    ],
)
def test_what_is_refused(published, tmp_path, damage, message):
    source = shutil.copytree(published, tmp_path / "source")
    damage(source)
    with pytest.raises(CheckpointError, match=message):
        convert_fastwan(source, tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_gates_that_are_not_whole_and_tensors_that_nobody_knows(base, tmp_path):
    lacking = write_gates(tmp_path / "lacking", base, blocks_1_to_gate_compress_bias=None)
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, such as blocks.1.to_gate_compress.bias"):
        convert_fastwan(lacking, tmp_path / "made")
    more = write_gates(tmp_path / "more", base, blocks_0_attn1_to_q_bias=torch.ones(5))
    with pytest.raises(CheckpointError, match=r"blocks.0.attn1.to_q.bias of .* is \[5\]"):
        convert_fastwan(more, tmp_path / "made")
    with pytest.raises(CheckpointError, match="exists already: give a new folder"):
        convert_fastwan(base, lacking)
    with pytest.raises(LayoutError, match="source: no/such cannot be had from the hub"):
        convert_fastwan("no/such", tmp_path / "made")


def test_one_file_for_comfyui(tmp_path):
    """The transformer alone, in Wan's own names as checkpoints have them, and the gates beside it."""
    source = write_fastwan(tmp_path / "FastWan", shards=2)
    file = convert_fastwan(source, tmp_path / "new" / "fastwan.safetensors")
    found, own = load_file(file), {}
    for shard in (source / "transformer").glob("*.safetensors"):
        own |= load_file(shard)
    gates = {f"vsa.{name}" for name in own if "to_gate_compress" in name}
    prefix = "model.diffusion_model."
    assert len(found) == len(own) and len(gates) == 4
    assert {name for name in found if not name.startswith(prefix)} == gates
    for one, other in {
        "vsa.blocks.1.to_gate_compress.bias": "blocks.1.to_gate_compress.bias",
        f"{prefix}blocks.1.self_attn.o.weight": "blocks.1.attn1.to_out.0.weight",
        f"{prefix}blocks.0.norm3.weight": "blocks.0.norm2.weight",
        f"{prefix}blocks.0.modulation": "blocks.0.scale_shift_table",
        f"{prefix}head.modulation": "scale_shift_table",
        f"{prefix}head.head.bias": "proj_out.bias",
        f"{prefix}text_embedding.2.weight": "condition_embedder.text_embedder.linear_2.weight",
        f"{prefix}time_projection.1.bias": "condition_embedder.time_proj.bias",
        f"{prefix}patch_embedding.weight": "patch_embedding.weight",
    }.items():
        assert found[one].dtype == torch.bfloat16 and found[one].equal(own[other]), one
    with safe_open(file, "pt") as opened:
        facts = json.loads(opened.metadata()["vidaccel"])
    assert facts == {"vsa": {"density": 0.2, "cube": [4, 4, 4]}}


def test_one_file_of_a_model_without_gates(tmp_path):
    source = write_fastwan(tmp_path / "FullAttn", gated=False)
    file = convert_fastwan(source, tmp_path / "full.safetensors")
    assert all(name.startswith("model.diffusion_model.") for name in load_file(file))
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_of_a_repository_one_file_needs_the_transformer_alone(tmp_path, monkeypatch):
    source, asked = write_fastwan(tmp_path / "FastWan"), []

    def download(repository, **options):
        asked.append(options["allow_patterns"])
        return str(source)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    convert_fastwan("some/FastWan", tmp_path / "fastwan.safetensors")
    assert asked == [["model_index.json", "transformer/*"]]


def test_a_file_that_is_there_or_is_to_be_linked(tmp_path):
    source = write_fastwan(tmp_path / "FastWan")
    (tmp_path / "there.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"there.safetensors exists already: give a new name, or delete it first"):
        convert_fastwan(source, tmp_path / "there.safetensors")
    with pytest.raises(CheckpointError, match=r"link is for a folder, and new.safetensors is one file"):
        convert_fastwan(source, tmp_path / "new.safetensors", link=True)
    _other_size(source)
    with pytest.raises(CheckpointError, match="its config needs"):
        convert_fastwan(source, tmp_path / "new.safetensors")
    assert not (tmp_path / "new.safetensors").exists()
