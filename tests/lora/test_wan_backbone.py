"""Wan models as `ae_adapt` sees them: the student, the encodings, samples, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from vidaccel import AutoencoderDCV
from vidaccel.autoencoders.convert import write_published_file
from vidaccel.lora.backbones.base import SampleRequest
from vidaccel.lora.backbones.folders import load_autoencoder, located, read_config
from vidaccel.lora.backbones.wan import WanBackbone
from vidaccel.lora.config import ConfigError


@pytest.fixture(autouse=True, scope="module")
def _short_texts() -> None:
    """Prompts are as long as the models want them."""


def test_the_student_starts_as_the_base_with_a_silent_head(text_base, autoencoder_folder):
    backbone = WanBackbone(str(text_base), str(autoencoder_folder))
    student = backbone.student()
    base = WanTransformer3DModel.from_pretrained(text_base, subfolder="transformer")
    own = {name for name, _ in base.named_parameters() if not name.startswith(backbone.trained_fully)}
    state, base_state = dict(student.named_parameters()), dict(base.named_parameters())
    assert all(torch.equal(state[name], base_state[name]) for name in own)
    assert tuple(student.patch_embedding.weight.shape) == (24, 4, 1, 1, 1)
    bound = (6 / (4 + 24)) ** 0.5  # Xavier
    assert 0.5 * bound < student.patch_embedding.weight.abs().max() <= bound
    out = backbone.velocity(
        student, torch.randn(1, 4, 2, 2, 2), torch.tensor([0.3]), [{"states": torch.randn(3, 64)}], {}
    )
    assert out.shape == (1, 4, 2, 2, 2) and not out.any()


def test_merged_padding_changes_nothing(text_base, autoencoder_folder):
    plain = WanBackbone(str(text_base), str(autoencoder_folder))
    merged = WanBackbone(str(text_base), str(autoencoder_folder), merge_text_padding=True)
    torch.manual_seed(1)
    first = plain.student()
    torch.nn.init.normal_(first.proj_out.weight)
    second = merged.student()
    second.load_state_dict(first.state_dict())
    texts = [{"states": torch.randn(3, 64)}, {"states": torch.randn(6, 64)}]
    assert merged.pad(texts).shape == (2, 7, 64) and plain.pad(texts).shape == (2, 512, 64)
    arguments = (torch.randn(2, 4, 2, 2, 2), torch.tensor([0.3, 0.8]), texts, {})
    with torch.no_grad():
        torch.testing.assert_close(
            plain.velocity(first, *arguments), merged.velocity(second, *arguments), rtol=1e-4, atol=1e-5
        )


def test_texts_are_those_of_the_pipeline(text_base, autoencoder_folder):
    from diffusers import WanPipeline

    backbone = WanBackbone(str(text_base), str(autoencoder_folder))
    prompts = ["a red circle moves left", "a"]
    states = backbone.text_encoder().encode(prompts)
    pipe = WanPipeline.from_pretrained(text_base)
    wanted, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512)
    torch.testing.assert_close(backbone.pad(states), wanted)
    assert states[0]["states"].shape[0] > states[1]["states"].shape[0]


def test_encoded_parts(image_base, autoencoder_folder):
    backbone = WanBackbone(str(image_base), str(autoencoder_folder))
    pixels = torch.rand(2, 3, 8, 64, 64) * 2 - 1
    parts = backbone.encoder(("latents", "teacher", "condition", "teacher_condition", "image_embeds")).encode(pixels)
    shapes = {name: tuple(value.shape) for name, value in parts.items()}
    assert shapes == {
        "latents": (2, 4, 2, 2, 2),
        "teacher": (2, 8, 2, 8, 8),
        "condition": (2, 8, 2, 2, 2),
        "teacher_condition": (2, 12, 2, 8, 8),
        "image_embeds": (2, 5, 16),
    }
    for name in ("condition", "teacher_condition"):
        assert (parts[name][:, :4, 0] == 1).all() and not parts[name][:, :4, 1:].any()
    direct = backbone.autoencoder.encode(pixels).latent * 1.5
    torch.testing.assert_close(parts["latents"], direct)


def test_the_teachers_condition_is_the_pipelines(image_base, autoencoder_folder):
    from diffusers import WanImageToVideoPipeline

    backbone = WanBackbone(str(image_base), str(autoencoder_folder))
    pixels = torch.rand(1, 3, 8, 64, 64) * 2 - 1
    made = backbone.encoder(("teacher_condition",)).encode(pixels)["teacher_condition"]
    pipe = WanImageToVideoPipeline.from_pretrained(image_base)
    _, wanted = pipe.prepare_latents(pixels[:, :, 3], 1, 8, 64, 64, 5, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(made, wanted)


@pytest.mark.parametrize("layout", ["one file", "shards", "no safetensors"])
def test_the_teacher_is_read_alone(tmp_path, text_base, autoencoder_folder, monkeypatch, layout):
    """The rest of the transformer may be 28 GB. Where its files allow no other way, all of it is read."""
    base = tmp_path / "base"
    shutil.copytree(text_base, base)
    whole = WanTransformer3DModel.from_pretrained(text_base, subfolder="transformer")
    if layout != "one file":
        shutil.rmtree(base / "transformer")
        shards = layout == "shards"
        size = "20KB" if shards else "1GB"
        whole.save_pretrained(base / "transformer", max_shard_size=size, safe_serialization=shards)
        assert (len(list((base / "transformer").glob("*.safetensors"))) > 1) == shards
    backbone = WanBackbone(str(base), str(autoencoder_folder))
    if layout != "no safetensors":
        monkeypatch.setattr(WanTransformer3DModel, "from_pretrained", lambda *a, **k: pytest.fail("all of it was read"))
    teacher = backbone.teacher()
    assert torch.equal(teacher.patch_embedding.weight, whole.patch_embedding.weight)
    assert torch.equal(teacher.patch_embedding.bias, whole.patch_embedding.bias)
    assert teacher({"teacher": torch.randn(1, 8, 2, 4, 4)}).shape == (1, 24, 2, 2, 2)


def test_encoders_are_named_without_taking_memory_of_the_gpu(image_base, autoencoder_folder):
    """Those of a later phase would lie there through all of the one before. "meta" stands for the GPU."""
    backbone, alike = (WanBackbone(str(image_base), str(autoencoder_folder), device=d) for d in ("meta", "cpu"))
    parts = ("latents", "teacher", "image_embeds")
    assert backbone.encoder(parts).identities == alike.encoder(parts).identities
    assert backbone.text_encoder().identity == alike.text_encoder().identity


def test_the_cache_knows_how_clips_were_encoded(image_base, autoencoder_folder):
    """In half precision the same weights have other latents, which a cache must not mix; those of float32 keep their
    name."""
    parts = ("latents", "condition", "teacher", "image_embeds")
    ways: list[dict] = [{}, {"autoencoder_dtype": torch.bfloat16}, {"autoencoder_tiling": True}]
    plain, half, tiled = (
        WanBackbone(str(image_base), str(autoencoder_folder), **way).encoder(parts).identities for way in ways
    )
    assert {name for name in parts if half[name] != plain[name]} == {"latents", "condition"}
    assert {name for name in parts if tiled[name] != plain[name]} == {"latents", "condition", "teacher"}
    assert not any("torch." in name for name in plain.values())


def test_the_autoencoder_is_saved_as_it_was(tmp_path, text_base, autoencoder_folder):
    """In half precision, in several files, whatever it encoded in."""
    half = AutoencoderDCV.from_pretrained(autoencoder_folder, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half", max_shard_size="20KB")
    backbone = WanBackbone(str(text_base), str(tmp_path / "half"))
    backbone.save(backbone.student(), tmp_path / "saved")
    first, second = (
        {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "config.json"}
        for folder in (tmp_path / "half", tmp_path / "saved" / "vae")
    )
    assert first == second and len(first) > 2


@pytest.mark.parametrize("place", ["dc-ae-v-1.0.pt", ""])
def test_a_published_autoencoder_is_to_be_converted(tmp_path, autoencoder_folder, place):
    (tmp_path / "published").mkdir()
    write_published_file(autoencoder_folder, tmp_path / "published" / "dc-ae-v-1.0.pt")
    given = str(tmp_path / "published" / place).rstrip("/")
    with pytest.raises(ConfigError, match=f"`vidaccel convert {given} FOLDER`, and give that"):
        read_config(AutoencoderDCV, located(given, "model.autoencoder", "demo-dc", part="vae"))
    with pytest.raises(ConfigError, match=f"`vidaccel convert {given} FOLDER`, and give that"):
        load_autoencoder(AutoencoderDCV, given, "model.start")


def test_samples_see_the_picture_that_training_saw(image_base, autoencoder_folder):
    """Not a picture divided by 255 once more, which is all but black to the image encoder."""
    backbone = WanBackbone(str(image_base), str(autoencoder_folder))
    pixels = torch.randint(0, 256, (1, 3, 8, 64, 64)).float() / 127.5 - 1
    parts = backbone.encoder(("condition", "image_embeds")).encode(pixels)
    student, seen = backbone.student(), []
    student.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    texts = ({"states": torch.randn(3, 64)}, {"states": torch.randn(1, 64)})
    backbone.sample(student, texts, SampleRequest(8, 64, 64, 1, 1.0, 0, pixels[0, :, 0]))
    torch.testing.assert_close(seen[0]["encoder_hidden_states_image"], parts["image_embeds"])
    torch.testing.assert_close(seen[0]["hidden_states"][:, 4:], parts["condition"], rtol=1e-4, atol=1e-5)


# -- what is refused ---------------------------------------------------------------------------------------------------


def changed(base: Path, folder: Path, part: str, **values) -> Path:
    """A copy of a base whose config of a part has other values."""

    shutil.copytree(base, folder)
    file = folder / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return folder


@pytest.mark.parametrize(
    ("part", "values", "words"),
    [
        (
            "transformer",
            {"in_channels": 12},
            "takes 12 channels .* a text-to-video model takes 8 .* image-to-video model takes 20",
        ),
        ("transformer", {"pos_embed_seq_len": 514}, "first and last frame .pos_embed_seq_len is 514"),
        ("transformer", {"patch_size": [2, 2, 2]}, r"patches of \(2, 2, 2\)"),
        ("transformer", {"_class_name": "FluxTransformer2DModel"}, "has a FluxTransformer2DModel"),
        ("vae", {"scale_factor_spatial": 32}, "a token of .* is 64 pixels wide, and one of .* 32"),
    ],
)
def test_a_base_that_does_not_fit(tmp_path, text_base, autoencoder_folder, part, values, words):
    base = changed(text_base, tmp_path / "base", part, **values)
    with pytest.raises(ConfigError, match=words):
        WanBackbone(str(base), str(autoencoder_folder))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("two stages", "a Wan 2.2 model with two transformers, and ae_adapt trains one: give a Wan 2.1 model"),
        ("timestep for each token", r"with a timestep for each token \(expand_timesteps\), which DCVideoGenPipeline"),
    ],
)
def test_wan_2_2_is_told_why(wan_bases, autoencoder_folder, kind, words):
    with pytest.raises(ConfigError, match=words):
        WanBackbone(str(wan_bases[kind]), str(autoencoder_folder))


def test_an_autoencoder_that_does_not_fit(tmp_path, text_base, autoencoder_folder):
    for cls in ("AutoencoderDC", "AutoencoderKLWan"):
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": cls}))
        with pytest.raises(ConfigError, match=f"is a {cls}, but a Wan model is adapted to an AutoencoderDCV"):
            WanBackbone(str(text_base), str(tmp_path))
    broken = tmp_path / "broken"
    shutil.copytree(autoencoder_folder, broken)
    (broken / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="model.autoencoder: .*broken is no autoencoder that AutoencoderDCV can load"):
        WanBackbone(str(text_base), str(broken))


def test_missing_models_are_named(tmp_path, text_base, autoencoder_folder):
    with pytest.raises(ConfigError, match="nowhere.*no readable config.json"):
        WanBackbone(str(tmp_path / "nowhere"), str(autoencoder_folder))
    with pytest.raises(ConfigError, match="nowhere has no readable config.json of a AutoencoderDCV"):
        WanBackbone(str(text_base), str(tmp_path / "nowhere"))


def test_the_run_of_an_autoencoder_stands_for_it(tmp_path, autoencoder_folder):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("recipe: autoencoder\n")
    with pytest.raises(
        ConfigError, match=r"^model\.autoencoder: .*run is the folder of a training that has written no auto"
    ):
        located(str(run), "model.autoencoder", "demo-dc", part="vae")
    shutil.copytree(autoencoder_folder, run / "autoencoder")
    place = located(str(run), "model.autoencoder", "demo-dc", part="vae")
    assert place == str(run / "autoencoder") == located(place, "model.autoencoder", "demo-dc", part="vae")
    assert read_config(AutoencoderDCV, place)
