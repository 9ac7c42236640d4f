"""Published DC-VideoGen models on the hub; the hub itself is a folder here."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub
from tiny_adapter import write_adapter
from tiny_dc import generate_dc, make_clip, make_text, write_published

from vidaccel import demo
from vidaccel.pipelines import DCVideoGenImageToVideoPipeline, DCVideoGenPipeline
from vidaccel.pipelines.deep_compression import published_hub
from vidaccel.pipelines.deep_compression.adapted import adapted_transformer
from vidaccel.pipelines.deep_compression.adapter_folder import AdapterError
from vidaccel.pipelines.deep_compression.published_files import LayoutError
from vidaccel.pipelines.deep_compression.published_hub import fetch_published
from vidaccel.pipelines.files.weight_files import transformer_files

T2V, I2V = DCVideoGenPipeline, DCVideoGenImageToVideoPipeline
AUTOENCODER = "dc-ai/dc-ae-v-1.0-f32t4c32"
ALONE = {T2V: "dc-ai/DC-Gen-Wan2.1-T2V-14B", I2V: "dc-ai/DC-Gen-Wan2.1-I2V-14B"}
BASES = {T2V: "Wan-AI/Wan2.1-T2V-14B-Diffusers", I2V: "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"}
WHOLE = "nvidia/DC-VideoGen-Wan2.1-14B"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("VIDACCEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "converted"


@pytest.fixture
def fake_hub(tmp_path, monkeypatch) -> FakeHub:
    """The repositories that are known, tiny, with files that nobody needs."""
    root = tmp_path / "repositories"
    base = write_published(root / "base", "text")
    for component, value in make_clip().items():
        value.save_pretrained(base / component)
    (base / "vae").mkdir()
    (base / "vae" / "config.json").write_text("{}")
    whole = write_published(root / "whole")
    (whole / "original").mkdir()
    (whole / "original" / "weights.pt").write_bytes(b"x")
    repositories = {
        ALONE[T2V]: write_published(root / "text", "transformer"),
        ALONE[I2V]: write_published(root / "image", "transformer-image"),
        AUTOENCODER: write_published(root / "autoencoder", "vae"),
        **{name: base for name in BASES.values()},
        WHOLE: whole,
    }
    return FakeHub(tmp_path / "hub", repositories).install(monkeypatch)


def _runs(pipe) -> bool:
    pipe.set_progress_bar_config(disable=True)
    return generate_dc(pipe, prompt="a cat", num_inference_steps=1).shape == (1, 8, 3, 32, 64)


@pytest.mark.parametrize("cls", [T2V, I2V])
def test_a_known_repository_loads_in_one_line(fake_hub, tmp_path, caplog, cls):
    options = {"token": "secret", "cache_dir": str(tmp_path / "elsewhere")}
    with caplog.at_level(logging.INFO, logger="vidaccel"):
        pipe = cls.from_pretrained(ALONE[cls], revision="main", **options)
    assert _runs(pipe) and pipe.vae.config.latent_channels == 4
    assert f"{ALONE[cls]}: autoencoder is not given, so it is {AUTOENCODER}." in caplog.text
    assert f"{ALONE[cls]}: base is not given, so it is {BASES[cls]}." in caplog.text
    assert f"(with autoencoder {AUTOENCODER}, base {BASES[cls]}) is in a published layout" in caplog.text
    # How to reach the hub holds for all three; the version only for the one that was asked for.
    for name, given in fake_hub.asked:
        assert given == ({**options, "revision": "main"} if name == ALONE[cls] else options), name
    assert {name for name, _ in fake_hub.asked} == {ALONE[cls], AUTOENCODER, BASES[cls]}
    assert not any(file.startswith("vae") for file in fake_hub.got[BASES[cls]])


def test_a_known_repository_is_converted_once(fake_hub, monkeypatch):
    T2V.from_pretrained(ALONE[T2V])
    fake_hub.asked.clear()
    assert _runs(T2V.from_pretrained(ALONE[T2V]))
    assert {name for name, _ in fake_hub.asked} == {ALONE[T2V]}


def test_parts_that_are_given_or_there_are_not_replaced(fake_hub, tmp_path):
    own, base = write_published(tmp_path / "own", "vae"), write_published(tmp_path / "base", "text")
    assert _runs(T2V.from_pretrained(ALONE[T2V], autoencoder=own, base=base))
    assert set(fake_hub.got) == {ALONE[T2V]}
    fake_hub.repositories[ALONE[T2V]] = write_published(tmp_path / "with its own", "transformer vae")
    assert _runs(T2V.from_pretrained(ALONE[T2V], **make_text(), scheduler=T2V.from_pretrained(WHOLE).scheduler))
    assert AUTOENCODER not in fake_hub.got and BASES[T2V] not in fake_hub.got


def test_the_other_kind_is_refused_before_anything_else_is_fetched(fake_hub):
    with pytest.raises(LayoutError, match="has in_channels 12, but .* a text-to-video model needs 4"):
        T2V.from_pretrained(ALONE[I2V])
    assert set(fake_hub.got) == {ALONE[I2V]}


def test_an_autoencoder_by_its_hub_id(fake_hub, tmp_path):
    source = write_published(tmp_path / "source", "transformer text")
    assert _runs(T2V.from_pretrained(source, autoencoder=AUTOENCODER, token="secret"))
    assert fake_hub.asked == [(AUTOENCODER, {"token": "secret"})]
    with pytest.raises(
        LayoutError, match=r"autoencoder: no/such cannot be had from the hub \(404: there is no no/such"
    ):
        T2V.from_pretrained(source, autoencoder="no/such")
    with pytest.raises(LayoutError, match=r"base: no/such cannot be had from the hub"):
        T2V.from_pretrained(write_published(tmp_path / "alone", "transformer vae"), base="no/such")


@pytest.mark.parametrize("cls", [T2V, I2V])
def test_only_the_files_of_the_pipeline_are_fetched(fake_hub, cls):
    assert _runs(cls.from_pretrained(WHOLE))
    folders = {file.partition("/")[0] for file in fake_hub.got[WHOLE]}
    shared = {"text_encoder", "tokenizer", "scheduler", "dc-ae-v-1.0-f32t4c4.pt"}
    image = {"transformer_i2v", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"}
    assert folders == shared | (image if cls is I2V else {"transformer_t2v"})


def test_what_is_given_is_not_fetched(fake_hub):
    parts = T2V.from_pretrained(WHOLE).components
    fake_hub.got.clear()
    given = {name: parts[name] for name in ("text_encoder", "tokenizer", "vae")}
    assert _runs(T2V.from_pretrained(WHOLE, **given))
    assert {file.partition("/")[0] for file in fake_hub.got[WHOLE]} == {"transformer_t2v", "scheduler"}


@pytest.fixture
def transformers_loaded(monkeypatch) -> list[dict]:
    """The arguments with which transformers are loaded, which go on as they are."""
    from diffusers import WanTransformer3DModel

    seen, real = [], WanTransformer3DModel.from_pretrained.__func__
    monkeypatch.setattr(
        WanTransformer3DModel,
        "from_pretrained",
        classmethod(lambda cls, *args, **kwargs: (seen.append(kwargs), real(cls, *args, **kwargs))[1]),
    )
    return seen


def test_an_adapter_and_its_autoencoder_on_the_hub(fake_hub, tmp_path, transformers_loaded):
    """The autoencoder in the published form; the version asked for is that of the adapter."""
    adapter = tmp_path / "adapter"
    write_adapter(adapter, in_channels=4, channels=4, autoencoder=AUTOENCODER)
    shutil.rmtree(adapter / "vae")
    fake_hub.repositories["some/adapter"] = adapter
    transformers_loaded.clear()
    pipe = T2V.from_pretrained("some/adapter", revision="v1", token="secret")
    assert _runs(pipe) and pipe.vae.config.block_out_channels == (4,) * 7
    assert fake_hub.got["some/adapter"] >= {"adapter.json", "embedder_head.safetensors"}
    assert ("some/adapter", {"token": "secret", "revision": "v1"}) in fake_hub.asked
    assert (AUTOENCODER, {"token": "secret"}) in fake_hub.asked
    assert "revision" not in transformers_loaded[0] and transformers_loaded[0]["token"] == "secret"


def test_how_to_reach_the_hub_holds_for_the_base_of_an_adapter(tmp_path, transformers_loaded):
    write_adapter(tmp_path / "adapter")
    transformers_loaded.clear()
    chosen = {"token": "secret", "cache_dir": str(tmp_path), "local_files_only": True}
    T2V.from_pretrained(tmp_path / "adapter", **chosen)
    assert {name: transformers_loaded[0].get(name) for name in chosen} == chosen


def test_the_base_of_an_adapter_is_compared_on_the_hub_too(fake_hub, tmp_path, monkeypatch):
    import huggingface_hub
    from diffusers import WanTransformer3DModel

    fake_hub.repositories["some/base"] = demo.path()
    write_adapter(tmp_path / "right", base_hash=transformer_files(str(demo.path())))
    write_adapter(tmp_path / "wrong", base_hash="0123456789abcdef")
    real = WanTransformer3DModel.from_pretrained

    def load(base: str, subfolder: str, dtype: torch.dtype | None) -> WanTransformer3DModel:
        return real(huggingface_hub.snapshot_download(base, allow_patterns=[f"{subfolder}/*"]), subfolder=subfolder)

    monkeypatch.setattr(WanTransformer3DModel, "from_pretrained", load)
    assert adapted_transformer(tmp_path / "right", "some/base").config.in_channels == 8
    with pytest.raises(AdapterError, match="trained on demo, and the transformer of some/base has other weights"):
        adapted_transformer(tmp_path / "wrong", "some/base")


def test_fetching_for_a_conversion(fake_hub, tmp_path, monkeypatch):
    assert (fetch_published(WHOLE, T2V.__name__) / "transformer_t2v" / "config.json").is_file()
    fake_hub.repositories["some/pipeline"] = demo.path()
    for name, message in (
        ("some/pipeline", "some/pipeline is a diffusers pipeline already"),
        ("no/such", "no/such is no folder here and cannot be had from the hub .404: there is no no/such"),
    ):
        with pytest.raises(LayoutError, match=message):
            fetch_published(name, T2V.__name__)
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "nothing"))
    monkeypatch.setattr(published_hub, "_layout", lambda *_: "unknown")
    with pytest.raises(LayoutError, match="was not downloaded before, and the hub cannot be reached"):
        fetch_published("no/such", T2V.__name__)


def test_known_parts_need_no_hub(tmp_path):
    found = published_hub.known_parts(ALONE[T2V], tmp_path, without=("vae",))
    assert found == {"base": BASES[T2V]}
    assert published_hub.known_parts("some/model", tmp_path) == {}
