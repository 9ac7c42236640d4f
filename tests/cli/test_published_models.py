"""Models in the layout in which DC-VideoGen is published, on the command line."""

from __future__ import annotations

import pytest
from fake_hub import FakeHub
from tiny_dc import make_picture, write_published

from vidaccel.autoencoders import AutoencoderDCV
from vidaccel.generation.errors import BadInput
from vidaccel.generation.media.video_reader import read_video
from vidaccel.generation.models.inspected import inspect_model
from vidaccel.pipelines import DCVideoGenImageToVideoPipeline, DCVideoGenPipeline

WHOLE, ALONE = "nvidia/DC-VideoGen-Wan2.1-14B", "dc-ai/DC-Gen-Wan2.1-T2V-14B"
AUTOENCODER, BASE = "dc-ai/dc-ae-v-1.0-f32t4c32", "Wan-AI/Wan2.1-T2V-14B-Diffusers"
VIDEO = ("--frames", 5, "--height", 20, "--width", 30, "--steps", 1, "--device", "cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDACCEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "converted"


@pytest.fixture
def fake_hub(tmp_path, monkeypatch) -> FakeHub:
    parts = {WHOLE: "t2v i2v text vae clip", ALONE: "transformer", AUTOENCODER: "vae", BASE: "text"}
    repositories = {
        name: write_published(tmp_path / f"repository {place}", part)
        for place, (name, part) in enumerate(parts.items())
    }
    return FakeHub(tmp_path / "hub", repositories).install(monkeypatch)


# -- convert -----------------------------------------------------------------------------------------------------------


def test_a_repository_of_the_hub_is_converted(vidaccel, fake_hub, tmp_path):
    result = vidaccel("convert", WHOLE, tmp_path / "text")
    assert result.exit_code == 0 and f"{WHOLE} is no folder here: fetching it from the hub" in result.output
    assert not any(file.startswith("transformer_i2v") for file in fake_hub.got[WHOLE])
    assert type(DCVideoGenPipeline.from_pretrained(tmp_path / "text")) is DCVideoGenPipeline
    assert vidaccel("convert", WHOLE, tmp_path / "image", "--image-to-video").exit_code == 0
    assert DCVideoGenImageToVideoPipeline.from_pretrained(tmp_path / "image").image_encoder is not None


def test_a_transformer_alone_has_what_it_was_made_with(vidaccel, fake_hub, tmp_path):
    result = vidaccel("convert", ALONE, tmp_path / "new")
    assert result.exit_code == 0
    for line in (f"No --autoencoder is given, so it is {AUTOENCODER}.", f"No --base is given, so it is {BASE}."):
        assert line in result.output
    assert DCVideoGenPipeline.from_pretrained(tmp_path / "new").vae.config.latent_channels == 4
    own = write_published(tmp_path / "own", "vae")
    result = vidaccel("convert", ALONE, tmp_path / "other", "--autoencoder", own, "--base", BASE)
    assert result.exit_code == 0 and "is given, so" not in result.output
    assert vidaccel("convert", own.parent / "repository 1", tmp_path / "third", "--autoencoder", AUTOENCODER, "--base",
                    BASE).exit_code == 0  # fmt: skip


@pytest.mark.parametrize("source", [AUTOENCODER, "folder"])
def test_an_autoencoder_alone(vidaccel, fake_hub, tmp_path, source):
    place = write_published(tmp_path / "folder", "vae") if source == "folder" else source
    result = vidaccel("convert", place, tmp_path / "vae", "--chunk-size", 8, "--scaling-factor", 0.5)
    assert result.exit_code == 0, result.output
    config = AutoencoderDCV.from_pretrained(tmp_path / "vae").config
    assert (config.chunk_size, config.scaling_factor, config.latent_channels) == (8, 0.5, 4)


def test_what_the_hub_does_not_have(vidaccel, fake_hub, tmp_path):
    result = vidaccel("convert", "no/such", tmp_path / "new")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "Error: no/such is no folder here and cannot be had from the hub (404" in result.stderr


def test_what_weights_do_not_tell_for_a_whole_folder(vidaccel, tmp_path):
    source = write_published(tmp_path / "source")
    result = vidaccel("convert", source, tmp_path / "new", "--chunk-size", 8, "--scaling-factor", 0.5)
    assert result.exit_code == 0, result.output
    config = AutoencoderDCV.from_pretrained(tmp_path / "new" / "vae").config
    assert (config.chunk_size, config.scaling_factor) == (8, 0.5)


# -- generate and info -------------------------------------------------------------------------------------------------


def test_a_video_of_a_published_folder(vidaccel, tmp_path, cache):
    source = write_published(tmp_path / "source")
    result = vidaccel("generate", "a dot", "--model", source, *VIDEO, "--out", tmp_path / "out.mp4")
    assert result.exit_code == 0, (result.output, result.exception)
    assert read_video(tmp_path / "out.mp4")[0].shape == (5, 20, 30, 3)
    make_picture().save(tmp_path / "first.png")
    options = ("--model", source, "--image", tmp_path / "first.png", "--out", tmp_path / "image.mp4")
    result = vidaccel("generate", "a dot", *options, *VIDEO)
    assert result.exit_code == 0, (result.output, result.exception)
    assert read_video(tmp_path / "image.mp4")[0].shape == (5, 20, 30, 3)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    ("parts", "image", "name"),
    [
        ("t2v i2v text vae clip", False, "DCVideoGenPipeline"),
        ("t2v i2v text vae clip", True, "DCVideoGenImageToVideoPipeline"),
        ("i2v text vae clip", False, "DCVideoGenImageToVideoPipeline"),
        ("t2v text vae", True, "DCVideoGenPipeline"),
        ("transformer text vae", True, "DCVideoGenPipeline"),
        ("transformer-image text vae clip", False, "DCVideoGenImageToVideoPipeline"),
    ],
)
def test_which_pipeline_it_is(tmp_path, parts, image, name):
    source = write_published(tmp_path / "source", parts)
    facts = inspect_model(str(source), image=image)
    assert (facts.pipeline_class, facts.name) == (name, str(source))
    assert (facts.size_factor, facts.frame_factor, facts.patch, facts.pad_frames) == (32, 4, (1, 1, 1), 0)


def test_what_a_video_will_take(vidaccel, tmp_path):
    source = write_published(tmp_path / "source")
    result = vidaccel("info", "--forecast", "--model", source, "--frames", 8, "--height", 64, "--width", 64)
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    assert "8 (2 x 2 x 2)" in words
    # The transformer and the text encoder are links.
    assert all(f"{part} 0." in words for part in ("transformer", "text_encoder", "vae")), words


def test_what_it_lacks_is_said_with_the_fix(tmp_path):
    source = write_published(tmp_path / "source", "t2v text")
    with pytest.raises(BadInput, match=r"has no autoencoder.*vidaccel convert .*source NEW_FOLDER"):
        inspect_model(str(source))


def test_of_the_hub_only_what_was_fetched_before(fake_hub):
    with pytest.raises(BadInput, match=f'transformer_t2v has no weights.*with "vidaccel convert {WHOLE} NEW_FOLDER"'):
        inspect_model(WHOLE)
    DCVideoGenPipeline.from_pretrained(WHOLE)
    fake_hub.asked.clear()
    assert inspect_model(WHOLE).pipeline_class == "DCVideoGenPipeline"
    # A known repository, of whose parts one was fetched only.
    fake_hub.snapshot_download(ALONE)
    with pytest.raises(BadInput, match=f"autoencoder: {AUTOENCODER} cannot be had from the hub .*vidaccel convert"):
        inspect_model(ALONE)
    DCVideoGenPipeline.from_pretrained(ALONE)
    assert inspect_model(ALONE).makes_any_size
