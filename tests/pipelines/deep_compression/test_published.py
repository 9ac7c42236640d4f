from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_dc import DEEP, make_autoencoder, make_clip, make_dc_pipe, make_dc_transformer, make_text, write_published

from vidaccel import demo
from vidaccel.autoencoders import AutoencoderDCV
from vidaccel.autoencoders.convert import CheckpointError
from vidaccel.pipelines import DCVideoGenImageToVideoPipeline, DCVideoGenPipeline
from vidaccel.pipelines.deep_compression import published as layouts
from vidaccel.pipelines.deep_compression.published import LayoutError, cached_conversion, convert_repository

T2V, I2V = DCVideoGenPipeline, DCVideoGenImageToVideoPipeline
# What is read from weights alone.
READ = {**DEEP, "chunk_size": 40, "scaling_factor": 1.0}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("VIDACCEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "converted"


def _run(pipe, frames: int = 6, height: int = 30, width: int = 40) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    more = {"image": Image.fromarray(picture)} if isinstance(pipe, I2V) else {}
    generator = torch.Generator().manual_seed(0)
    return pipe(
        prompt="a cat", height=height, width=width, num_frames=frames, num_inference_steps=1, generator=generator,
        output_type="pt", **more,
    ).frames  # fmt: skip


def _expected(cls) -> torch.Tensor:
    image = cls is I2V
    transformer = make_dc_transformer(image, image_dim=80 if image else None)
    vae = make_autoencoder(**READ)
    return _run(make_dc_pipe(cls, transformer=transformer, vae=vae, **make_text(), **(make_clip() if image else {})))


def _leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if ".part" in path.name]


# -- the forms in which it is published --------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [T2V, I2V])
@pytest.mark.parametrize("vae_name", ["dc-ae-v-f32t4c4-1.0", "dc-ae-v-1.0-f32t4c4-bf16"])
def test_a_whole_repository(tmp_path, cls, vae_name):
    """Both transformers, text encoder, autoencoder and CLIP in one folder; both spellings of the autoencoder."""
    source = write_published(tmp_path / "source", vae_name=vae_name)
    pipe = cls.from_pretrained(source)
    assert type(pipe) is cls and type(pipe.vae) is AutoencoderDCV and not pipe.vae.training
    torch.testing.assert_close(_run(pipe), _expected(cls), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("cls", "part"), [(T2V, "transformer"), (I2V, "transformer-image")])
def test_a_transformer_alone_with_base_and_autoencoder(tmp_path, cls, part):
    source = write_published(tmp_path / "source", part)
    base = write_published(tmp_path / "base", "text")
    if cls is I2V:
        clip = make_clip()
        clip["image_encoder"].save_pretrained(base / "image_encoder")
        clip["image_processor"].save_pretrained(base / "image_processor")
    vae = write_published(tmp_path / "vae", "vae") / "dc-ae-v-1.0-f32t4c4.pt"
    wanted = _expected(cls)
    pipe = cls.from_pretrained(str(source), base=base, autoencoder=vae)
    torch.testing.assert_close(_run(pipe), wanted, atol=1e-5, rtol=1e-4)
    # An autoencoder that is converted already, as a folder.
    pipe.vae.save_pretrained(tmp_path / "vae folder")
    again = cls.from_pretrained(str(source), base=str(base), autoencoder=str(tmp_path / "vae folder"))
    torch.testing.assert_close(_run(again), wanted, atol=1e-5, rtol=1e-4)


def test_a_base_gives_only_what_is_missing(tmp_path):
    source, base = write_published(tmp_path / "source"), write_published(tmp_path / "base", "text")
    (base / "tokenizer" / "tokenizer_config.json").write_text("broken")
    assert _run(T2V.from_pretrained(source, base=base)).shape == (1, 6, 3, 30, 40)


def test_image_to_video_without_image_encoder(tmp_path):
    source = write_published(tmp_path / "source", "text vae")
    make_dc_transformer(image=True).save_pretrained(source / "transformer")
    pipe = I2V.from_pretrained(source)
    assert pipe.image_encoder is None and _run(pipe).shape == (1, 6, 3, 30, 40)


def test_an_autoencoder_folder_and_safetensors(tmp_path):
    for name in ("vae", "file"):
        source = write_published(tmp_path / name, "t2v text")
        model = make_autoencoder(**READ)
        if name == "vae":
            model.save_pretrained(source / "vae")
        else:
            from safetensors.torch import save_file

            from vidaccel.autoencoders.convert import to_published

            save_file(to_published(model.state_dict(), model.config), source / "dc-ae-v-1.0-f32t4c4.safetensors")
        torch.testing.assert_close(_run(T2V.from_pretrained(source)), _expected(T2V), atol=1e-5, rtol=1e-4)


def test_options_reach_diffusers(tmp_path):
    source = write_published(tmp_path / "source")
    pipe = T2V.from_pretrained(source, dtype=torch.bfloat16, text_encoder=None, tokenizer=None)
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.bfloat16 and pipe.text_encoder is None
    named = T2V.from_pretrained(source, dtype="bfloat16", text_encoder=None, tokenizer=None)
    assert named.transformer.dtype == named.vae.dtype == torch.bfloat16


# -- the cache ---------------------------------------------------------------------------------------------------------


def test_it_is_converted_once(tmp_path, cache, monkeypatch, caplog):
    source = write_published(tmp_path / "source")
    with caplog.at_level(logging.WARNING, logger="vidaccel"):
        T2V.from_pretrained(source)
        assert "converting it once" in caplog.text and str(source) in caplog.text
        caplog.clear()
        monkeypatch.setattr(layouts, "convert_repository", lambda *_, **__: pytest.fail("converted again"))
        T2V.from_pretrained(str(source))
        T2V.from_pretrained(source / ".." / "source")
    assert caplog.text == "" and len(list(cache.iterdir())) == 1 and _leftovers(cache) == []


def test_what_needs_no_conversion_is_a_link(tmp_path, cache):
    source = write_published(tmp_path / "source")
    folder = cached_conversion(source, T2V.__name__)
    links = {path.name: path.resolve() for path in folder.iterdir() if path.is_symlink()}
    assert links == {
        "transformer": source / "transformer_t2v",
        **{name: source / name for name in ("text_encoder", "tokenizer", "scheduler")},
    }
    assert (folder / "vae" / "config.json").is_file() and not (folder / "vae").is_symlink()
    # A folder of one's own has no links.
    own = convert_repository(source, tmp_path / "own", T2V.__name__)
    assert own == tmp_path / "own" and not any(path.is_symlink() for path in own.rglob("*"))
    shutil.rmtree(source)
    assert _run(T2V.from_pretrained(own)).shape == (1, 6, 3, 30, 40)


def test_where_links_cannot_be_made_folders_are_copied(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    folder = cached_conversion(write_published(tmp_path / "source"), T2V.__name__)
    assert (folder / "transformer" / "config.json").is_file() and not (folder / "transformer").is_symlink()


@pytest.mark.parametrize("changed", ["source", "autoencoder", "base"])
def test_a_changed_file_is_converted_anew(tmp_path, changed):
    parts = {"source": "t2v", "autoencoder": "vae", "base": "text"}
    folders = {name: write_published(tmp_path / name, part) for name, part in parts.items()}
    arguments = {"autoencoder": folders["autoencoder"] / "dc-ae-v-1.0-f32t4c4.pt", "base": folders["base"]}
    first = cached_conversion(folders["source"], T2V.__name__, **arguments)
    assert cached_conversion(folders["source"], T2V.__name__, **arguments) == first
    shutil.rmtree(folders[changed])
    write_published(folders[changed], parts[changed])
    assert cached_conversion(folders["source"], T2V.__name__, **arguments) != first


def test_both_pipelines_have_their_own(tmp_path):
    source = write_published(tmp_path / "source")
    assert cached_conversion(source, T2V.__name__) != cached_conversion(source, I2V.__name__)


def test_another_process_may_be_first(tmp_path, monkeypatch):
    """As when the ranks of one launch load the same model at once."""
    source = write_published(tmp_path / "source")
    real, seen = layouts.convert_repository, []

    def late(given, target, *args, **kwargs):
        real(given, target, *args, **kwargs)
        seen.append(target)
        return real(given, target, *args, **kwargs)

    monkeypatch.setattr(layouts, "convert_repository", late)
    folder = cached_conversion(source, T2V.__name__)
    assert [folder] == seen and (folder / "model_index.json").is_file()


# -- what is missing or does not fit -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "parts", "message"),
    [
        (T2V, "text vae", "neither model_index.json nor transformer_t2v/config.json nor transformer/.*text to video"),
        (I2V, "t2v text vae clip", "nor transformer_i2v/config.json nor transformer/.*for image to video"),
        (T2V, "t2v text", "no autoencoder.*autoencoder=.*dc-ai/dc-ae-v-1.0-f32t4c32"),
        (T2V, "t2v vae", "lacks text_encoder, tokenizer, scheduler: .*base='Wan-AI/Wan2.1-T2V-14B-Diffusers'"),
        (I2V, "i2v text vae", "lacks image_encoder, image_processor: .*base='Wan-AI/Wan2.1-I2V-14B-720P-Diffusers'"),
        (T2V, "transformer-image text vae", "has in_channels 12, but .*4 latent channels a text-to-video.*needs 4"),
        (I2V, "transformer text vae clip", "has in_channels 4, but .*4 latent channels an image-to-video.*needs 12"),
    ],
)
def test_what_is_missing_is_said_with_the_fix(tmp_path, cache, cls, parts, message):
    source = write_published(tmp_path / "source", parts)
    with pytest.raises(LayoutError, match=message):
        cls.from_pretrained(source)
    assert not cache.exists() or list(cache.iterdir()) == []


def test_what_is_no_published_layout_is_not_called_one(tmp_path, caplog):
    (tmp_path / "empty").mkdir()
    with caplog.at_level(logging.INFO, logger="vidaccel"):
        with pytest.raises(LayoutError, match="empty holds neither model_index.json"):
            T2V.from_pretrained(tmp_path / "empty")
        with pytest.raises(LayoutError, match="lacks text_encoder"):
            T2V.from_pretrained(write_published(tmp_path / "source", "t2v vae"))
    assert caplog.text == ""


def test_folders_of_other_kinds_are_said_to_be_so(tmp_path):
    make_autoencoder().save_pretrained(tmp_path / "vae")
    for source, message in (
        (demo.path(), "is a diffusers pipeline already"),
        (demo.path("demo-dc"), "is an adapter .adapter.json.*there is nothing to convert"),
        (tmp_path / "vae", "is the folder of an AutoencoderDCV: .*ends in .pt or .safetensors"),
    ):
        with pytest.raises(LayoutError, match=message):
            convert_repository(source, tmp_path / "target")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that nobody can write to")
def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDACCEL_CACHE", "/proc/cache")
    with pytest.raises(
        OSError, match=r"^/proc/cache/converted/source-.* cannot be written, because no folder can be ma"
    ):
        T2V.from_pretrained(write_published(tmp_path / "source"))


def test_several_autoencoders_are_not_guessed(tmp_path):
    source = write_published(tmp_path / "source")
    shutil.copy(source / "dc-ae-v-1.0-f32t4c4.pt", source / "dc-ae-v-1.0-f32t4c4-bf16.pt")
    with pytest.raises(LayoutError, match=r"several autoencoders \(.*-bf16.pt, .*\): choose one with autoencoder="):
        T2V.from_pretrained(source)
    assert T2V.from_pretrained(source, autoencoder=source / "dc-ae-v-1.0-f32t4c4.pt").vae.config.latent_channels == 4


def test_an_autoencoder_that_is_not_there(tmp_path):
    source = write_published(tmp_path / "source")
    with pytest.raises(LayoutError, match="autoencoder: .*none is neither a DC-AE-V file, .* nor a hub id"):
        T2V.from_pretrained(source, autoencoder=tmp_path / "none")


def test_an_autoencoder_of_other_channels_is_refused(tmp_path):
    from vidaccel.autoencoders.convert import to_published

    source = write_published(tmp_path / "source")
    model = make_autoencoder(**{**READ, "latent_channels": 6})
    torch.save({"model_state_dict": to_published(model.state_dict(), model.config)}, tmp_path / "six.pt")
    with pytest.raises(LayoutError, match="has in_channels 4, but with an autoencoder of 6 latent channels.*needs 6"):
        T2V.from_pretrained(source, autoencoder=tmp_path / "six.pt")


def test_a_transformer_of_another_class_is_refused(tmp_path):
    source = write_published(tmp_path / "source")
    file = source / "transformer_t2v" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": "LTXVideoTransformer3DModel"}))
    with pytest.raises(LayoutError, match="_class_name 'LTXVideoTransformer3DModel', but .*'WanTransformer3DModel'"):
        T2V.from_pretrained(source)
    file.write_text("{")
    with pytest.raises(LayoutError, match=r"config.json cannot be read as JSON"):
        T2V.from_pretrained(source)


def test_parts_for_a_whole_pipeline_are_refused(tmp_path):
    whole = convert_repository(write_published(tmp_path / "source"), tmp_path / "whole", T2V.__name__)
    with pytest.raises(LayoutError, match="diffusers pipeline, which has no use for autoencoder= and base=: .*vae="):
        T2V.from_pretrained(whole, autoencoder="a.pt", base="b")


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    convert_repository(write_published(tmp_path / "source"), tmp_path / "whole", T2V.__name__)
    assert _run(T2V.from_pretrained("~/whole")).shape == (1, 6, 3, 30, 40)
    assert _run(T2V.from_pretrained("~/source")).shape == (1, 6, 3, 30, 40)


@pytest.mark.parametrize("place", ["/no/such/folder", "./none/at/all"])
def test_a_folder_that_is_not_there(place):
    with pytest.raises(LayoutError, match=f"{place} is neither a folder nor the name of a model on the hub"):
        T2V.from_pretrained(place)


# -- nothing half written ----------------------------------------------------------------------------------------------


def test_a_target_is_not_overwritten(tmp_path):
    source = write_published(tmp_path / "source")
    (tmp_path / "target").mkdir()
    with pytest.raises(LayoutError, match="target exists already: give a new folder, or delete it first"):
        convert_repository(source, tmp_path / "target")
    with pytest.raises(LayoutError, match="none is no folder"):
        convert_repository(tmp_path / "none", tmp_path / "new")


@pytest.mark.parametrize("damage", ["vae", "clip", "scheduler", "disk"])
def test_an_error_leaves_nothing(tmp_path, cache, monkeypatch, damage):
    source = write_published(tmp_path / "source")
    error: type[Exception] = CheckpointError
    if damage == "vae":
        file = source / "dc-ae-v-1.0-f32t4c4.pt"
        file.write_bytes(file.read_bytes()[:-500])
    elif damage == "clip":
        file = next(source.glob("*clip*.pth"))
        file.write_bytes(file.read_bytes()[:-500])
    elif damage == "scheduler":
        (source / "scheduler" / "scheduler_config.json").write_text("{")
        error = LayoutError
    else:
        monkeypatch.setattr(AutoencoderDCV, "save_pretrained", _full_disk)
        error = OSError
    before = sorted(path for path in source.rglob("*"))
    for target in (tmp_path / "target", None):
        with pytest.raises(error):
            if target is None:
                I2V.from_pretrained(source)
            else:
                convert_repository(source, target, I2V.__name__)
    assert not (tmp_path / "target").exists() and _leftovers(tmp_path) == []
    assert not cache.exists() or list(cache.iterdir()) == []
    # What was linked is still there.
    assert sorted(path for path in source.rglob("*")) == before


def _full_disk(*_, **__):
    raise OSError(28, "No space left on device")


# -- the hub -----------------------------------------------------------------------------------------------------------


def _into_hub_cache(folder: Path, name: str, cache: Path) -> None:
    """Lay a folder out as huggingface_hub does when it has downloaded it."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, place / "snapshots" / ("0" * 40))


def test_a_downloaded_repository_loads_without_the_hub(tmp_path):
    _into_hub_cache(write_published(tmp_path / "source"), "some/model", tmp_path / "hub")
    assert _run(T2V.from_pretrained("some/model", cache_dir=tmp_path / "hub")).shape == (1, 6, 3, 30, 40)


def test_what_was_not_downloaded_is_left_to_diffusers(tmp_path):
    with pytest.raises(OSError, match="some/model"):
        T2V.from_pretrained("some/model", cache_dir=tmp_path / "hub")
    # One file of it was: that is no layout.
    only = tmp_path / "only"
    only.mkdir()
    (only / "README.md").write_text("x")
    _into_hub_cache(only, "some/other", tmp_path / "hub")
    with pytest.raises(OSError, match="some--other.*model_index.json"):
        T2V.from_pretrained("some/other", cache_dir=tmp_path / "hub")
