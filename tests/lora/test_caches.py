"""Encodings that are kept on disk: whole, damaged, halved, made beforehand, and what they are named by."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from row_encoders import Rows, Words
from safetensors import SafetensorError

from vidaccel.lora import run
from vidaccel.lora.__main__ import main
from vidaccel.lora.backbones.base import Encoder, TextEncoder
from vidaccel.lora.backbones.wan_encoding import WanTextEncoder
from vidaccel.lora.checkpoints.checkpoint import CheckpointError
from vidaccel.lora.config import ConfigError, load
from vidaccel.lora.data.cache import TensorCache, fingerprint, not_kept, tokenizer_fingerprint
from vidaccel.lora.data.demo import DemoScenes
from vidaccel.lora.data.latents import Latents, say_what_is_cut
from vidaccel.lora.data.sampler import Pick
from vidaccel.lora.distributed.generators import Place
from vidaccel.lora.recipes.ae_adapt import AEAdapt
from vidaccel.lora.recipes.base import Process
from vidaccel.lora.settings import SizeSettings
from vidaccel.pipelines.files.whole_files import NotWritten

HERE = Process(torch.device("cpu"))
SIZE = SizeSettings(4, 32, 32)


@pytest.fixture(autouse=True, scope="module")
def _short_texts() -> None:
    """Prompts are as long as the models want them."""


class Repeated(DemoScenes):
    """Scenes of which the first comes three times a round."""

    def members(self, sizes):
        return {number: [0, 0, *listed] for number, listed in super().members(sizes).items()}


def latents(cache: TensorCache, encoder: Encoder, texts: TextEncoder, dataset=None) -> Latents:
    return Latents(dataset or DemoScenes(clips=6), (SIZE,), encoder, texts, cache)


def pick(index: int) -> Pick:
    return Pick(index, (SIZE.frames, SIZE.height, SIZE.width), Place(0, 0, 1, 0))


# -- files -------------------------------------------------------------------------------------------------------------


def test_cached_tensors(tmp_path):
    cache = TensorCache(tmp_path)
    assert cache.read("a", "b") is None and not cache.has("a", "b")
    cache.write({"x": torch.ones(2, dtype=torch.bfloat16)}, "a", "b")
    assert torch.equal(cache.read("a", "b")["x"], torch.ones(2, dtype=torch.bfloat16)) and cache.read("a", "c") is None
    cache.path("a", "b").write_bytes(b"damaged")
    assert cache.read("a", "b") is None
    assert len([file for file in tmp_path.rglob("*") if file.is_file()]) == 1


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"the cache .*file cannot be written: .*[^.]\. See that it can be, or"):
        TensorCache(tmp_path / "file").write({"x": torch.ones(1)}, "a")
    full = NotWritten(tmp_path / "a", SafetensorError("I/O error: No space left on device (os error 28)"))
    assert ". Make room, or choose another data.cache" in str(not_kept(tmp_path, full))


def test_fingerprints():
    torch.manual_seed(0)
    first = torch.nn.Linear(300, 300)
    second = torch.nn.Linear(300, 300)
    before = fingerprint(first)
    assert before == fingerprint(first) != fingerprint(second)
    second.load_state_dict(first.state_dict())
    assert fingerprint(second) == before
    with torch.no_grad():
        second.bias.add_(1e-3)
    assert fingerprint(second) != before


DAMAGE = {
    "empty": lambda whole: b"",
    "cut off": lambda whole: whole[: len(whole) // 2],
    "without its last byte": lambda whole: whole[:-1],
    "too long": lambda whole: whole + b"more",
    "zeros": lambda whole: bytes(len(whole)),
    "of another kind": lambda whole: b"damaged" * 20,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_whole_is_not_there(tmp_path, damage):
    cache = TensorCache(tmp_path)
    cache.write({"x": torch.ones(64)}, "a")
    file = cache.path("a")
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    assert not cache.has("a") and cache.read("a") is None
    cache.write({"x": torch.ones(64)}, "a")
    assert cache.has("a")


def test_damaged_files_are_made_again_all_at_once(tmp_path, caplog):
    """Whether of clips or of captions; the others are left alone."""
    cache = TensorCache(tmp_path)
    first = latents(cache, Rows(), Words())
    first.fill(HERE)
    wanted = first.load(pick(0))["latents"].clone()
    files = sorted(file for file in tmp_path.rglob("*") if file.is_file())
    damages = list(DAMAGE.values())
    for number, file in enumerate(files[::2]):
        file.write_bytes(damages[number % len(damages)](file.read_bytes()))
    encoder, texts = Rows(), Words()
    caplog.set_level(logging.WARNING)
    second = latents(cache, encoder, texts)
    second.fill(HERE)
    assert encoder.clips + len(texts.given) == len(files[::2])
    assert (
        f"{encoder.clips} files of the cache are damaged, or of an earlier version, and are made again" in caplog.text
    )
    assert second.members == first.members and torch.equal(second.load(pick(0))["latents"], wanted)
    third = Rows(), Words()
    latents(cache, *third).fill(HERE)
    assert third[0].clips == 0 and third[1].given == []


def test_a_file_that_is_damaged_in_the_run_is_made_again_by_the_next(tmp_path):
    """What is whole by its length can have other faults, so it is removed when they show."""
    cache = TensorCache(tmp_path)
    first = latents(cache, Rows(), Words())
    first.fill(HERE)
    file = cache.path(*first._key(pick(2), "latents"))
    file.write_bytes(b"damaged since")
    with pytest.raises(OSError, match="is gone or damaged: resume, and it is made again"):
        first.load(pick(2))
    assert not file.exists()
    encoder = Rows()
    latents(cache, encoder, Words()).fill(HERE)
    assert encoder.clips == 1 and file.exists()


@pytest.mark.parametrize("where", ["number", "shape", "checksum", "all numbers"])
def test_damage_that_leaves_the_length_is_noticed(tmp_path, where):
    """safetensors has no checksum of its own."""
    cache = TensorCache(tmp_path)
    cache.write({"x": torch.arange(64.0).view(4, 16)}, "a")
    file = cache.path("a")
    whole = bytearray(file.read_bytes())
    if where == "number":
        whole[-100] ^= 1
    elif where == "all numbers":
        whole[-256:] = bytes(256)
    else:
        old, new = {"shape": (b"[4,16]", b"[16,4]"), "checksum": (b"crc32", b"crc31")}[where]
        assert whole.count(old) == 1
        whole = whole.replace(old, new)
    file.write_bytes(whole)
    assert cache.read("a") is None
    cache.write({"x": torch.arange(64.0).view(4, 16)}, "a")
    assert torch.equal(cache.read("a")["x"], torch.arange(64.0).view(4, 16))


def test_every_kind_of_tensor_has_a_checksum(tmp_path):
    cache = TensorCache(tmp_path)
    made = {
        "none": torch.zeros(0, 3),
        "one": torch.tensor(3.0, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "turned": torch.arange(6).view(2, 3).T,
    }
    cache.write(made, "a")
    read = cache.read("a")
    assert read.keys() == made.keys() and all(torch.equal(read[name], value) for name, value in made.items())


def test_damaged_numbers_are_encoded_again(tmp_path):
    """A caption at once, a clip by the next run: the models that encode it are not there any more."""
    cache = TensorCache(tmp_path)
    first = latents(cache, Rows(), Words())
    first.fill(HERE)
    clip = cache.path(*first._key(pick(2), "latents"))
    caption = first.dataset.caption(2)
    for file in (clip, cache.path(*first._texts._key((caption, "")))):
        whole = bytearray(file.read_bytes())
        whole[-1] ^= 64
        file.write_bytes(whole)
    words = Words()
    second = latents(cache, Rows(), words)
    assert torch.equal(second.texts([caption])[0]["states"], Words().encode([caption])[0]["states"])
    assert words.given == [caption]
    with pytest.raises(OSError, match="is gone or damaged: resume, and it is made again"):
        second.load(pick(2))
    encoder = Rows()
    latents(cache, encoder, Words()).fill(HERE)
    wanted = Rows().encode(first.dataset.pixels(pick(2))[None])["latents"][0]
    assert encoder.clips == 1 and torch.equal(first.load(pick(2))["latents"], wanted)


def test_processes_look_before_one_of_them_writes(tmp_path):
    """Else they would share lists that differ, and some clips would be encoded by none of them."""
    encoder, seen = Rows(), []

    class First(Process):
        """Notes how many clips are encoded whenever it waits for the second."""

        def wait(self):
            seen.append(encoder.clips)

        def merged(self, own):
            seen.append(encoder.clips)
            return own | {number: ("latents",) for number in (1, 3, 5)}

        def gathered(self, items):
            latents(TensorCache(tmp_path), Rows(), Words()).fill(HERE)  # the second does its part
            return items

        def any(self, flag):
            return flag

    made = latents(TensorCache(tmp_path), encoder, Words())
    made._texts.fill = lambda *_: None  # it waits as well
    made.fill(First(torch.device("cpu"), 0, 2))
    assert seen == [0, 0, 3]


class OfTwo(Process):
    """The first of two processes; the second says that these clips failed, and that it finds none of its share."""

    others: tuple = ()
    absent: tuple = ()

    def wait(self):
        pass

    def any(self, flag):
        return flag

    def gathered(self, items):
        return [*items, *self.others]

    def merged(self, own):
        return own | {number: ("latents",) for number in self.absent}


def test_a_cache_that_processes_do_not_share(tmp_path, monkeypatch):
    """Each trained without the clips of the others, as if they could not be decoded."""
    monkeypatch.setattr("vidaccel.lora.data.latents._LATE", 0)
    process, made = OfTwo(torch.device("cpu"), 0, 2), latents(TensorCache(tmp_path), Rows(), Words())
    with pytest.raises(ConfigError, match=r"data.cache: process 0 of 2 does not find .* one folder that all processes"):
        made.fill(process)
    made._texts.fill(made.dataset.captions(), HERE)
    object.__setattr__(process, "absent", (1, 3, 5))
    with pytest.raises(ConfigError, match="does not find in .* 3 encodings that others wrote"):
        made.fill(process)
    assert made.members == {0: list(range(6))}
    # What the other one found on its own disk, which it alone looked for.
    object.__setattr__(process, "absent", ())
    with pytest.raises(ConfigError, match="does not find in .* 3 encodings that others wrote"):
        made.fill(process)


def test_what_fails_in_one_process_is_left_out_in_all(tmp_path, caplog):
    """Also where it was encoded before."""
    latents(TensorCache(tmp_path), Rows(), Words()).fill(HERE)
    process, made = OfTwo(torch.device("cpu"), 0, 2), latents(TensorCache(tmp_path), Rows(), Words())
    object.__setattr__(process, "others", ((pick(1).size, 1),))
    made.fill(process)
    assert made.members == {0: [0, 2, 3, 4, 5]}
    assert "1 of 6 clips cannot be decoded and are left out" in caplog.text


def test_clips_that_come_more_often_are_encoded_once(tmp_path):
    encoder = Rows()
    made = latents(TensorCache(tmp_path), encoder, Words(), Repeated(clips=4))
    made.fill(HERE)
    assert encoder.clips == 4 and made.members == {0: [0, 0, 0, 1, 2, 3]}


# -- half precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_half_of_the_space(tmp_path, half):
    values = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    whole, halved = TensorCache(tmp_path), TensorCache(tmp_path, half)
    for cache in (whole, halved):
        cache.write({"x": values, "n": torch.tensor([3])}, "a")
    sizes = [cache.path("a").stat().st_size for cache in (whole, halved)]
    assert sizes[1] < 0.52 * sizes[0]
    read = halved.read("a")
    assert read["x"].dtype == torch.float32 and read["n"].dtype == torch.int64
    torch.testing.assert_close(read["x"], values, rtol=2**-8, atol=1e-6)
    assert torch.equal(whole.read("a")["x"], values)


def test_numbers_too_large_for_half_precision(tmp_path):
    with pytest.raises(CheckpointError, match="numbers up to 70000, above the 65504 of float16: set data.cache_dtype"):
        TensorCache(tmp_path, "float16").write({"x": torch.tensor([1.0, 7e4])}, "a")
    TensorCache(tmp_path, "bfloat16").write({"x": torch.tensor([1.0, 7e4])}, "a")


# -- captions ----------------------------------------------------------------------------------------------------------


def test_captions_that_are_cut_off_are_counted(caplog):
    say_what_is_cut(["one two three", "one two three four five"], Words())
    assert not caplog.records
    say_what_is_cut(["one two", "one two three four five six", "1 2 3 4 5 6 7"], Words())
    assert (
        "2 of 3 captions have more than the 5 tokens that the text encoder takes; what is beyond is cut off: "
        '"one two three four five six..." (6 tokens), "1 2 3 4 5 6 7..." (7 tokens)' in caplog.text
    )


def test_wan_counts_the_tokens_that_it_takes(text_base):
    """One word more than fits changes nothing any more, and is counted; one that fits does."""
    encoder = WanTextEncoder(str(text_base), length=8)
    words = ["a", "red", "circle", "moves", "left", "on", "a", "grey", "background"]
    texts = [" ".join(words[:count]) for count in range(4, 10)]
    counts = encoder.count(texts)
    assert counts == [count + 1 for count in range(4, 10)]  # and the end
    states = [text["states"] for text in encoder.encode(texts)]
    for before, after, count in zip(states, states[1:], counts[1:], strict=False):
        assert (len(before) < len(after)) == (count <= encoder.length)
    assert encoder.count(["a  red &amp; circle"]) == encoder.count(["a red & circle"])  # as the pipeline cleans it


def test_a_run_says_which_captions_are_cut_off(tmp_path, text_base, autoencoder_folder, video_folder, caplog):
    folder = tmp_path / "videos"
    shutil.copytree(video_folder, folder)
    (folder / "metadata.jsonl").unlink()
    for name in "abcd":
        (folder / f"{name}.txt").write_text("a red circle " * (200 if name == "b" else 2))
    size = {"frames": 8, "height": 32, "width": 64}
    file = settings(tmp_path, text_base, autoencoder_folder, kind="videos", folder=str(folder), sizes=[size], clips=1)
    run("ae_adapt", file, encode_only=True)
    assert "1 of 2 captions have more than the 512 tokens" in caplog.text and "(601 tokens)" in caplog.text


# -- what they are named by --------------------------------------------------------------------------------------------


def test_tokenizers_are_named_by_what_they_make_of_texts(tmp_path, text_base):
    def load(folder: Path):
        absent = dict.fromkeys(("transformer", "transformer_2", "vae", "scheduler", "text_encoder"))
        return WanPipeline.from_pretrained(folder, **absent).tokenizer

    first = load(text_base)
    name = tokenizer_fingerprint(first)
    first(["a red circle"], padding="max_length", max_length=7, truncation=True)
    assert tokenizer_fingerprint(first) == name
    shutil.copytree(text_base, tmp_path / "moved")
    assert tokenizer_fingerprint(load(tmp_path / "moved")) == name
    rules = tmp_path / "moved" / "tokenizer" / "tokenizer.json"
    content = json.loads(rules.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    rules.write_text(json.dumps(content))
    assert tokenizer_fingerprint(load(tmp_path / "moved")) != name
    identities = [WanTextEncoder(str(folder)).identity for folder in (text_base, tmp_path / "moved")]
    assert identities[0] != identities[1]


# -- encoding beforehand -----------------------------------------------------------------------------------------------


def settings(place: Path, base: Path, autoencoder: Path, **data) -> Path:
    """Settings of a run of one step a phase, in `place/a.yaml`."""
    size = {"frames": 8, "height": 64, "width": 64}
    phase = {"steps": 1}
    content = {
        "recipe": "ae_adapt",
        "out": str(place / "run"),
        "model": {"base": str(base), "autoencoder": str(autoencoder)},
        "data": {"kind": "demo", "clips": 3, "sizes": [size], "cache": str(place / "cache"), **data},
        "phases": {"align": phase, "head": phase, "lora": {**phase, "rank": 2}},
        "validation": {"clips": 1, "prompts": [], "steps": 1},
        "loop": {"tracker": "none", "device": "cpu"},
    }
    file = place / "a.yaml"
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize("half", ["float32", "float16"])
def test_encoding_beforehand(tmp_path, text_base, autoencoder_folder, capsys, monkeypatch, half):
    """All that the run needs is there afterwards, and nothing of the run."""
    file = settings(tmp_path, text_base, autoencoder_folder, cache_dtype=half)
    assert main(["ae_adapt", "--config", str(file), "--encode-only"]) == 0
    shown = capsys.readouterr().out
    assert f"cache: {tmp_path / 'cache'}" in shown and "clips: 2" in shown
    assert not (tmp_path / "run").exists()
    files = set((tmp_path / "cache").rglob("*"))
    monkeypatch.setattr(WanTextEncoder, "encode", lambda *_: pytest.fail("a caption was encoded again"))
    assert "pipeline" in run("ae_adapt", file)
    assert set((tmp_path / "cache").rglob("*")) == files


def test_where_encodings_are_kept(tmp_path):
    """Where they are not, a run that is stopped promises none."""
    for data, kept in (({}, str(tmp_path / "cache")), ({"cache": None}, None), ({"clips": None}, None)):
        config = load(AEAdapt.Config, settings(tmp_path, tmp_path, tmp_path, **data))
        assert AEAdapt(config, HERE).encodings == kept


def test_what_cannot_be_encoded_beforehand(tmp_path, text_base, autoencoder_folder):
    for data, words in (
        ({"cache": None}, "data.cache is missing: with --encode-only"),
        ({"clips": None}, "clips that are endless cannot be encoded beforehand"),
    ):
        file = settings(tmp_path, text_base, autoencoder_folder, **data)
        with pytest.raises(ConfigError, match=words):
            run("ae_adapt", file, encode_only=True)
    with pytest.raises(ConfigError, match="--encode-only continues no run: leave --resume out"):
        run("ae_adapt", file, resume="auto", encode_only=True)
    overrides = ["data.clips=3", f"out={tmp_path / 'run'}", "loop.device=cpu", "loop.tracker=none"]
    with pytest.raises(ConfigError, match="the recipe autoencoder keeps no encodings"):
        run("autoencoder", "demo_autoencoder", overrides, encode_only=True)
