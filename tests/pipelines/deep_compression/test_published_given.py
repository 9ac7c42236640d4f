"""Published layouts with components and settings that are given, and what becomes of conversions in the cache."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from tiny_dc import DEEP, generate_dc, make_autoencoder, make_clip, make_dc_transformer, make_text, write_published
from tiny_wan import make_scheduler

from vidaccel.autoencoders.convert import CheckpointError
from vidaccel.pipelines import DCVideoGenImageToVideoPipeline, DCVideoGenPipeline, convert_repository
from vidaccel.pipelines.deep_compression.published import cached_conversion
from vidaccel.pipelines.deep_compression.published_files import LayoutError
from vidaccel.pipelines.deep_compression.published_parts import only_autoencoder
from vidaccel.pipelines.files.conversions import files_below

T2V, I2V = DCVideoGenPipeline, DCVideoGenImageToVideoPipeline
FILE = "dc-ae-v-1.0-f32t4c4.pt"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("VIDACCEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "converted"


def _runs(pipe) -> bool:
    pipe.set_progress_bar_config(disable=True)
    return generate_dc(pipe, prompt="a cat", num_inference_steps=1).shape == (1, 8, 3, 32, 64)


# -- components --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [T2V, I2V])
def test_components_that_are_given_need_not_be_there(tmp_path, cls):
    source = write_published(tmp_path / "source", "transformer-image" if cls is I2V else "transformer")
    given = {"vae": make_autoencoder(**DEEP), "scheduler": make_scheduler(), **make_text()}
    given |= make_clip() if cls is I2V else {}
    for _ in range(2):  # the second time from the cache
        pipe = cls.from_pretrained(source, **given)
        assert all(getattr(pipe, name) is value for name, value in given.items()) and _runs(pipe)
    # What is not given is still missed.
    del given["scheduler"]
    with pytest.raises(LayoutError, match="lacks scheduler: give the Wan pipeline"):
        cls.from_pretrained(source, **given)


def test_given_and_not_given_are_two_conversions(tmp_path, cache):
    source = write_published(tmp_path / "source", "t2v text vae")
    vae = make_autoencoder(**DEEP)
    assert T2V.from_pretrained(source, vae=vae).vae is vae
    assert T2V.from_pretrained(source).vae is not vae
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("cls", [T2V, I2V])
def test_a_transformer_that_is_given(tmp_path, cls):
    transformer = make_dc_transformer(cls is I2V)
    pipe = cls.from_pretrained(write_published(tmp_path / "source", "text vae"), transformer=transformer)
    assert pipe.transformer is transformer and _runs(pipe)


def test_a_base_gives_only_what_is_not_given(tmp_path):
    source, base = write_published(tmp_path / "source", "transformer vae"), write_published(tmp_path / "base", "text")
    text = make_text()
    shutil.rmtree(base / "text_encoder")
    pipe = T2V.from_pretrained(source, base=base, **text)
    assert pipe.text_encoder is text["text_encoder"] and _runs(pipe)


# -- the autoencoder ---------------------------------------------------------------------------------------------------


def test_an_autoencoder_in_a_folder_of_its_own(tmp_path):
    source, folder = write_published(tmp_path / "source", "t2v text"), write_published(tmp_path / "vae", "vae")
    assert _runs(T2V.from_pretrained(source, autoencoder=folder))
    # A config.json of something else does not make it the folder of an AutoencoderDCV.
    (folder / "config.json").write_text(json.dumps({"name": "dc-ae-v"}))
    assert _runs(T2V.from_pretrained(source, autoencoder=str(folder)))
    shutil.copy(folder / FILE, folder / "dc-ae-v-1.0-f32t4c4-bf16.pt")
    with pytest.raises(LayoutError, match="vae has several autoencoders"):
        T2V.from_pretrained(source, autoencoder=folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LayoutError, match=r"autoencoder: .*empty is neither .*\(dc-ae-v-\*.pt, "):
        T2V.from_pretrained(source, autoencoder=tmp_path / "empty")


def test_what_weights_do_not_tell_can_be_given(tmp_path, caplog):
    source = write_published(tmp_path / "source")
    plain = T2V.from_pretrained(source)
    assert (plain.vae.config.chunk_size, plain.vae.config.scaling_factor) == (40, 1.0)
    assert "chunk_size is taken to be 40 and scaling_factor is taken to be 1.0" in caplog.text
    caplog.clear()
    config = {"chunk_size": 8, "scaling_factor": 0.5}
    pipe = T2V.from_pretrained(source, autoencoder_config=config)
    assert (pipe.vae.config.chunk_size, pipe.vae.config.scaling_factor) == (8, 0.5) and _runs(pipe)
    assert "is taken to be" not in caplog.text
    # Other settings are another conversion.
    again = T2V.from_pretrained(source, autoencoder_config={**config, "chunk_size": 16})
    assert again.vae.config.chunk_size == 16


def test_settings_of_an_autoencoder_that_do_not_fit(tmp_path):
    source = write_published(tmp_path / "source")
    with pytest.raises(CheckpointError, match="AutoencoderDCV has no chunksize"):
        T2V.from_pretrained(source, autoencoder_config={"chunksize": 8})
    with pytest.raises(ValueError, match="chunk_size is 6"):
        T2V.from_pretrained(source, autoencoder_config={"chunk_size": 6})
    make_autoencoder(**DEEP).save_pretrained(source / "vae")
    with pytest.raises(LayoutError, match=r"autoencoder_config \(chunk_size\) is for a DC-AE-V file.*own config.json"):
        T2V.from_pretrained(source, autoencoder_config={"chunk_size": 8})
    whole = convert_repository(source, tmp_path / "whole")
    with pytest.raises(LayoutError, match="diffusers pipeline, which has no use for autoencoder_config="):
        T2V.from_pretrained(whole, autoencoder_config={"chunk_size": 8})


def test_a_folder_with_an_autoencoder_alone(tmp_path):
    folder = write_published(tmp_path / "vae", "vae")
    assert only_autoencoder(folder) == folder / FILE
    with pytest.raises(LayoutError, match=f"no DC-VideoGen model.*It holds an autoencoder, {FILE}, which .*convert"):
        T2V.from_pretrained(folder)
    for other in ("t2v vae", "t2v text vae"):
        assert only_autoencoder(write_published(tmp_path / other, other)) is None
    make_autoencoder().save_pretrained(tmp_path / "saved")
    assert only_autoencoder(tmp_path / "saved") is None


# -- found before the conversion ---------------------------------------------------------------------------------------


def test_a_scheduler_without_a_class(tmp_path, cache):
    source = write_published(tmp_path / "source")
    file = source / "scheduler" / "scheduler_config.json"
    content = json.loads(file.read_text())
    del content["_class_name"]
    file.write_text(json.dumps(content))
    with pytest.raises(LayoutError, match="scheduler_config.json has the _class_name None, but .*UniPCMultistep"):
        T2V.from_pretrained(source)
    file.write_text("[]")
    with pytest.raises(LayoutError, match="scheduler_config.json holds a list"):
        T2V.from_pretrained(source)
    assert not cache.exists()


@pytest.mark.parametrize("patch", [[1, 2, 2], None])
def test_a_transformer_of_other_patches(tmp_path, cache, patch):
    source = write_published(tmp_path / "source")
    file = source / "transformer_t2v" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "patch_size": patch}))
    with pytest.raises(LayoutError, match=r"config.json has patch_size (\[1, 2, 2\]|None), but .*needs \[1, 1, 1\]"):
        T2V.from_pretrained(source)
    assert not cache.exists()


def test_a_transformer_without_weights(tmp_path, cache):
    source = write_published(tmp_path / "source")
    for file in (source / "transformer_t2v").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(LayoutError, match="transformer_t2v has no weights .diffusion_pytorch_model"):
        T2V.from_pretrained(source)
    assert not cache.exists()


# -- the cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["folder", "content", "target of a link in it"])
@pytest.mark.parametrize("moved", [True, False])
def test_a_conversion_whose_links_lead_nowhere(tmp_path, cache, monkeypatch, caplog, lost, moved):
    """As when the cache of the hub is emptied, where files are links to blobs; a new version has another folder."""
    import huggingface_hub as hub

    source, snapshots = write_published(tmp_path / "source", "transformer vae"), []

    def download(*_, **__):
        snapshots.append(tmp_path / f"snapshot {len(snapshots) * moved}")
        blobs = snapshots[-1].with_suffix(".blobs")
        for folder in (blobs, snapshots[-1]):
            shutil.rmtree(folder, ignore_errors=True)
        write_published(blobs, "text")
        for path in [path for path in blobs.rglob("*") if path.is_file()]:
            link = snapshots[-1] / path.relative_to(blobs)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
        return str(snapshots[-1])

    monkeypatch.setattr(hub, "snapshot_download", download)
    first = cached_conversion(source, T2V.__name__, base="wan/base")
    assert cached_conversion(source, T2V.__name__, base="wan/base") == first and len(snapshots) == 1
    if lost == "folder":
        shutil.rmtree(snapshots[0])
    elif lost == "content":
        for file in (snapshots[0] / "tokenizer").iterdir():
            file.unlink()
    else:
        (snapshots[0].with_suffix(".blobs") / "tokenizer" / "tokenizer_config.json").unlink()
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="vidaccel"):
        assert _runs(T2V.from_pretrained(source, base="wan/base"))
    # What is downloaded to the same place makes the links good again.
    assert ("has lost files that it links to: converting it anew" in caplog.text) == moved
    assert len(snapshots) == 2 and [path.name for path in cache.iterdir()] == [first.name]
    assert (source / "transformer" / "config.json").is_file()


def test_a_change_in_a_linked_folder_is_seen(tmp_path):
    real = write_published(tmp_path / "real", "t2v text vae")
    source = tmp_path / "source"
    source.mkdir()
    for path in real.iterdir():
        (source / path.name).symlink_to(path)
    first = cached_conversion(source, T2V.__name__)
    assert cached_conversion(source, T2V.__name__) == first
    transformer = make_dc_transformer(seed=5)
    transformer.save_pretrained(real / "transformer_t2v", max_shard_size="20KB")
    second = cached_conversion(source, T2V.__name__)
    assert second != first
    loaded = T2V.from_pretrained(source).transformer.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in transformer.state_dict().items())


def test_links_in_a_circle_end(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "file").write_text("x")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "nowhere").symlink_to(tmp_path / "gone")
    assert sorted(path.name for path in files_below(tmp_path / "a")) == ["file", "nowhere"]
