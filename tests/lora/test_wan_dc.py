"""DC-VideoGen models as `lora` and `gft` train them: pipeline folders and adapter-only weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from lora_runs import recipe, write
from safetensors.torch import load_file, save_file
from tiny_adapter import write_adapter

import vidaccel
from vidaccel import AutoencoderDCV, DCVideoGenPipeline, demo
from vidaccel.lora import run
from vidaccel.lora.backbones import open_model
from vidaccel.lora.backbones.base import SampleRequest
from vidaccel.lora.config import ConfigError
from vidaccel.pipelines.deep_compression.adapter_folder import FULL_FILE
from vidaccel.pipelines.files.weight_files import transformer_files

SIZE = {"frames": 8, "height": 32, "width": 64}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, text_base, image_base, autoencoder_folder) -> dict[str, Path]:
    """Pipelines of 32x for text and first frames, and adapter-only weights of 4x for the built-in model."""
    from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel

    from vidaccel import DCVideoGenImageToVideoPipeline

    torch.manual_seed(3)
    root, vae = tmp_path_factory.mktemp("dc"), AutoencoderDCV.from_pretrained(autoencoder_folder)
    for name, base, stock, cls, channels in (
        ("text", text_base, WanPipeline, DCVideoGenPipeline, 4),
        ("first frame", image_base, WanImageToVideoPipeline, DCVideoGenImageToVideoPipeline, 12),
    ):
        parts = stock.from_pretrained(base, vae=None).components
        config = {k: v for k, v in parts["transformer"].config.items() if k[0] != "_"}
        changed = {**config, "patch_size": (1, 1, 1), "in_channels": channels, "out_channels": 4}
        cls(**{**parts, "vae": vae, "transformer": WanTransformer3DModel(**changed)}).save_pretrained(root / name)
    write_adapter(root / "adapter")
    return {name: root / name for name in ("text", "first frame", "adapter")}


def settings(folder: Path, base: Path, **sections) -> Path:
    size = {"frames": 8, "height": 16, "width": 16} if base.name == "adapter" else SIZE
    return write(folder, base, recipe="gft", data={"sizes": [size]}, **{"gft": {"max_scale": 4}, **sections})


@pytest.mark.parametrize("kind", ["text", "adapter"])
def test_an_adapter_is_put_into_the_pipeline_as_it_was_trained(tmp_path, folders, kind):
    file = settings(tmp_path, folders[kind])
    result = run("gft", file)
    phase = recipe(file).phases()[0]
    trained = phase.setup(load_file(tmp_path / "run" / "phases" / "train.safetensors")).eval()
    pipe = DCVideoGenPipeline.from_pretrained(folders[kind])
    config = pipe.transformer.config
    given = {
        "hidden_states": torch.randn(1, config.in_channels, 2, 2, 2),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": torch.randn(1, 5, config.text_dim),
    }
    with torch.no_grad():
        plain = pipe.transformer(**given).sample
    with vidaccel.guidance_free(pipe, result["lora"]), torch.no_grad():
        phase._told, pipe._guidance_scale = torch.tensor([0.5]), 2.0
        made = pipe.transformer(**given).sample
        torch.testing.assert_close(made, trained(**given).sample, rtol=1e-4, atol=1e-5)
        assert (made - plain).abs().max() > 1e-5


def test_all_weights(tmp_path, folders):
    """Of adapter-only weights a whole pipeline is written, with its autoencoder and text encoder."""
    result = run("gft", settings(tmp_path, folders["adapter"], gft={"train": "full"}, lora={"rank": 32, "alpha": None}))
    pipe = DCVideoGenPipeline.from_pretrained(result["pipeline"])
    pipe.set_progress_bar_config(disable=True)
    assert pipe.text_encoder is not None
    trained = load_file(tmp_path / "run" / "phases" / "train.safetensors")
    assert all(torch.equal(value, trained[name]) for name, value in pipe.transformer.named_parameters())
    given = {"height": 16, "width": 16, "num_frames": 8, "num_inference_steps": 1, "output_type": "latent"}
    with vidaccel.guidance_free(pipe):
        assert pipe("a red circle", guidance_scale=3.0, **given).frames.isfinite().all()


@pytest.mark.parametrize("kind", ["text", "adapter"])
def test_the_autoencoder_is_saved_as_it_was(tmp_path, folders, kind):
    """In half precision, whatever it encoded in."""
    shutil.copytree(folders[kind], tmp_path / "base")
    vae = tmp_path / "base" / "vae"
    AutoencoderDCV.from_pretrained(vae, dtype=torch.bfloat16).save_pretrained(vae)
    model = open_model(str(tmp_path / "base"), "lora")
    model.save(model.transformer(), tmp_path / "saved")
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "saved" / "vae" / name).read_bytes() == (vae / name).read_bytes()
    assert (
        DCVideoGenPipeline.from_pretrained(tmp_path / "saved").vae.config.scaling_factor
        == model.autoencoder.config.scaling_factor
    )


def test_first_frames(tmp_path, folders):
    """Their condition and image states are encoded, and the validation's videos start from them."""
    result = run("lora", write(tmp_path, folders["first frame"], data={"sizes": [SIZE]}))
    assert Path(result["lora"]).is_file()
    model = open_model(str(folders["first frame"]), "lora")
    made = model.encoder().encode(torch.rand(1, 3, 8, 32, 64) * 2 - 1)
    assert {name: tuple(value.shape[1:3]) for name, value in made.items()} == {
        "latents": (4, 2), "condition": (8, 2), "image_embeds": (5, 16),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["text", "adapter"])
def test_latents_and_videos_are_those_of_the_pipeline(folders, kind):
    model = open_model(str(folders[kind]), "lora")
    pipe = DCVideoGenPipeline.from_pretrained(folders[kind])
    pipe.set_progress_bar_config(disable=True)
    pixels = torch.rand(1, 3, 8, 32, 64) * 2 - 1
    with torch.no_grad():
        wanted = pipe.vae.encode(pixels).latent * pipe.vae.config.scaling_factor
    torch.testing.assert_close(model.encoder().encode(pixels)["latents"], wanted)
    transformer = model.transformer()
    for name, value in pipe.transformer.state_dict().items():
        torch.testing.assert_close(transformer.state_dict()[name], value)
    assert model.layout(8, 32, 64).tokens == wanted[0, 0].numel()
    texts = tuple(model.text_encoder().encode(["a red circle", ""]))
    video = model.sample(transformer, texts, SampleRequest(8, 32, 64, 2, 3.0, seed=1))
    given = {"height": 32, "width": 64, "num_frames": 8, "num_inference_steps": 2, "guidance_scale": 3.0}
    given["max_sequence_length"] = model.text_length
    theirs = pipe("a red circle", **given, generator=torch.Generator().manual_seed(1), output_type="pt").frames[0]
    torch.testing.assert_close(video, theirs.transpose(0, 1) * 2 - 1, atol=1e-4, rtol=1e-4)


def test_the_hash_of_adapter_only_weights_is_that_of_all_they_are(tmp_path, folders):
    """Of their own files and of their base, wherever they lie; their transformer knows where it is from."""
    adapter = folders["adapter"]
    hashed = transformer_files(str(adapter))
    shutil.copytree(adapter, tmp_path / "copy")
    assert transformer_files(str(tmp_path / "copy")) == hashed
    file = tmp_path / "copy" / FULL_FILE
    tensors = load_file(file)
    save_file({name: value + 1 for name, value in tensors.items()}, file)
    assert transformer_files(str(tmp_path / "copy")) != hashed
    shutil.copytree(demo.path(), tmp_path / "base")
    weights = tmp_path / "base" / "transformer" / "diffusion_pytorch_model.safetensors"
    half = weights.stat().st_size // 2
    weights.write_bytes(weights.read_bytes()[:half] + bytes(weights.stat().st_size - half))
    file = adapter / "adapter.json"
    facts = json.loads(file.read_text())
    shutil.copytree(adapter, tmp_path / "other")
    (tmp_path / "other" / "adapter.json").write_text(json.dumps({**facts, "base": str(tmp_path / "base")}))
    assert transformer_files(str(tmp_path / "other")) != hashed
    assert DCVideoGenPipeline.from_pretrained(adapter).transformer.config["_name_or_path"] == str(adapter)


@pytest.mark.parametrize(
    ("kind", "override", "words"),
    [
        ("text", "data.sizes=[{frames: 9, height: 32, width: 64}]", "9 frames do not fit: .* multiple of 4"),
        ("text", "data.sizes=[{frames: 8, height: 48, width: 64}]", "48x64 must be a multiple of 32"),
        ("text", "model.stage=high_noise", "has one transformer for all noise levels"),
        ("text", "model.first_frame=true", "takes no first frames"),
        ("first frame", "model.merge_text_padding=true", "merge_text_padding is for models without an image encoder"),
        ("adapter", "model.base=demo-wan", 'not the built-in "demo" or "demo-dc"'),
    ],
)
def test_what_does_not_fit(tmp_path, folders, kind, override, words):
    with pytest.raises(ConfigError, match=words):
        recipe(settings(tmp_path, folders[kind]), [override])


def test_large_clips_are_encoded_in_tiles(tmp_path, folders):
    """512 pixels of a side is one tile, whose latents stay as they are."""
    file = settings(tmp_path, folders["text"])
    made = [recipe(file, [f"model.autoencoder_tiling={on}"]) for on in ("false", "true")]
    whole, tiled = (one.flowing._encoder for one in made)
    assert whole.identities != tiled.identities and made[0].inputs() != made[1].inputs()
    large = torch.rand(1, 3, 4, 32, 544) * 2 - 1
    small = large[..., :512]
    assert torch.equal(whole.encode(small)["latents"], tiled.encode(small)["latents"])
    first, second = (one.encode(large)["latents"] for one in (whole, tiled))
    assert first.shape == second.shape and not torch.equal(first, second)


def test_adapter_only_weights_cannot_be_quantised(folders):
    with pytest.raises(ConfigError, match="cannot be quantised: save the pipeline with save_pretrained"):
        open_model(str(folders["adapter"]), "lora").transformer(quantisation=object())


def test_ends_that_do_not_belong_together(tmp_path, folders):
    shutil.copytree(folders["text"], tmp_path / "dc")
    file = tmp_path / "dc" / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "in_channels": 5}))
    with pytest.raises(ConfigError, match="takes 5 channels and makes 4, .* they do not belong together"):
        open_model(str(tmp_path / "dc"), "lora")
    shutil.copy(folders["text"] / "transformer" / "config.json", file)
    file = tmp_path / "dc" / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_frames": 3}))
    with pytest.raises(ConfigError, match="has pad_frames 3; training takes an AutoencoderDCV with pad_frames 0"):
        open_model(str(tmp_path / "dc"), "lora")
