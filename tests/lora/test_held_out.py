"""Clips that are measured and not trained on, and encodings that are kept: with files and a tiny encoder."""

from __future__ import annotations

import shutil
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from vidaccel.generation.media.files import Media
from vidaccel.lora.backbones.base import Encoder, TextEncoder
from vidaccel.lora.config import ConfigError
from vidaccel.lora.data.account import say_what_the_data_are
from vidaccel.lora.data.cache import TensorCache
from vidaccel.lora.data.demo import DemoScenes
from vidaccel.lora.data.folder import Entry, MediaFolder
from vidaccel.lora.data.held_out import hold_out
from vidaccel.lora.data.latents import Latents, Texts
from vidaccel.lora.data.sampler import without
from vidaccel.lora.recipes.base import Process
from vidaccel.lora.recipes.measured_clips import MeasuredClips
from vidaccel.lora.settings import DataSettings, FolderSettings, SizeSettings

WIDE, TALL, LONG = SizeSettings(8, 32, 64), SizeSettings(8, 64, 32), SizeSettings(16, 32, 64)
HERE = Process(torch.device("cpu"))


class Thumbnails(Encoder):
    """Parts that are averages of the pixels; keeps what it was asked for."""

    def __init__(self, *parts: str) -> None:
        self.parts, self.identities = parts, dict.fromkeys(parts, "1")
        self.calls, self.released = [], 0

    def encode(self, pixels, parts=None):
        parts = self.parts if parts is None else parts
        self.calls.append((len(pixels), tuple(parts)))
        return {part: pixels.mean(dim=(3, 4)) for part in parts}

    def release(self):
        self.released += 1


class Letters(TextEncoder):
    """A state for each letter."""

    identity, length = "letters", 8

    def __init__(self) -> None:
        self.calls, self.parked = [], 0

    def encode(self, prompts):
        self.calls += prompts
        return [{"states": torch.zeros(len(prompt), 4)} for prompt in prompts]

    def count(self, prompts):
        return [len(prompt) for prompt in prompts]

    def park(self):
        self.parked += 1


def files(folder, **changes) -> MediaFolder:
    return MediaFolder.open(DataSettings(kind="videos", folder=str(folder), sizes=(WIDE, TALL), **changes))


@pytest.fixture
def copied(video_folder, tmp_path):
    """The videos a and b (wide), c and d (tall) of three clips each; a is damaged after the first third."""
    shutil.copytree(video_folder, tmp_path / "videos")
    return tmp_path / "videos"


# -- which clips -------------------------------------------------------------------------------------------------------


def test_scenes():
    held = hold_out(DemoScenes(clips=5), [WIDE, TALL], 2)
    assert [(pick.index, pick.size) for pick in held.picks] == [(0, (8, 64, 32)), (1, (8, 64, 32))]
    assert held.clips == {0, 1} and hold_out(DemoScenes(clips=5), [WIDE], 0).clips == frozenset()
    assert len({pick.index for pick in hold_out(DemoScenes(), [WIDE], 3).picks}) == 3
    with pytest.raises(ConfigError, match=r"validation.clips is 5, but there are only 5"):
        hold_out(DemoScenes(clips=5), [WIDE], 5)


def test_no_frame_of_a_held_out_file_is_trained_on_and_clips_keep_their_shape(video_folder):
    """With a size of 16 frames last, the clip of 16 was held out and the clips of 8 in it were not."""
    source = files(video_folder)
    for sizes, count in (([WIDE, LONG], 1), ([WIDE, TALL], 8)):
        held = hold_out(source, sizes, count)
        members = source.members(sizes)
        left = {source.group(i) for listed in members.values() for i in listed if i not in held.clips}
        assert left and not left & {source.group(pick.index) for pick in held.picks} and len(held.picks) == count
        own = {index: sizes[number] for number, listed in members.items() for index in listed}
        for pick in held.picks:
            assert SizeSettings(*pick.size) == own[pick.index]
    assert {pick.size for pick in held.picks} == {(8, 32, 64), (8, 64, 32)}
    assert len({source.group(pick.index) for pick in hold_out(source, [WIDE, TALL], 3).picks}) == 1
    with pytest.raises(ConfigError, match="only 12 clips of at least 8 frames in 4 files, 12 of them to measure with"):
        hold_out(source, [WIDE, TALL], 12)


def test_clips_that_do_not_decode_are_replaced_when_the_run_begins(copied, damage, caplog):
    damage(copied / "a.mp4")
    source = files(copied)
    picks = hold_out(source, [WIDE, TALL], 3).picks
    assert "a.mp4 cannot be decoded" in caplog.text and "another clip is held out instead" in caplog.text
    assert {source.entries[source.group(pick.index)].path.name for pick in picks} <= {"a.mp4", "b.mp4"}
    assert len(picks) == 3 and all(source.pixels(pick).shape[1] == 8 for pick in picks)


def test_files_that_come_more_often_are_held_out_whole(video_folder):
    folders = (FolderSettings(str(video_folder), repeats=3),)
    source = MediaFolder.open(DataSettings(kind="videos", folders=folders, sizes=(WIDE, TALL)))
    held = hold_out(source, [WIDE, TALL], 3)
    assert len({pick.index for pick in held.picks}) == 3 == len(held.clips)
    left = without(source.members([WIDE, TALL]), held.clips)
    assert {size: len(indices) for size, indices in left.items()} == {0: 9, 1: 18} and not held.clips & {*left[0]}


def tiny_files(tmp_path, counts: dict[str, int], **changes) -> MediaFolder:
    """Folders by name with so many files of one clip each, which need not be decoded."""
    media = Media(32, 64, frames=8)
    entries = [
        Entry(tmp_path / f"{name}{number:02d}.mp4", "x", media, folder=list(counts).index(name))
        for name, count in counts.items()
        for number in range(count)
    ]
    return MediaFolder(entries, DataSettings(kind="videos", folder=str(tmp_path), sizes=(WIDE,), **changes), False)


@pytest.fixture
def undecoded(monkeypatch):
    monkeypatch.setattr(MediaFolder, "pixels", lambda self, pick: torch.zeros(3, *pick.size))


def test_where_nothing_is_said_a_tenth_is_measured_and_never_most_of_a_small_set(tmp_path, undecoded, video_folder):
    """Ten videos of one clip had eight held out, and two were trained on."""
    for files_there, measured in ((9, 0), (10, 1), (45, 4), (200, 8)):
        held = hold_out(tiny_files(tmp_path, {"a": files_there}), [WIDE], None, 0)
        assert len(held.picks) == len(held.clips) == measured
    # Of 12 clips in 4 files, one file is a quarter.
    assert hold_out(files(video_folder), [WIDE, TALL], None, 0).clips == frozenset()
    assert len(hold_out(files(video_folder), [WIDE, TALL], None, 0, usual=4, least=1).picks) == 1
    assert len(hold_out(DemoScenes(), [WIDE], None, 0).picks) == 8


def test_what_is_measured_is_of_all_folders_and_in_an_order_of_the_seed(tmp_path, undecoded):
    """It was the first files of the first folder."""
    source = tiny_files(tmp_path, {"a": 20, "b": 20})
    chosen = [
        [source.entries[source.group(p.index)].path.name for p in hold_out(source, [WIDE], 4, n).picks]
        for n in (0, 0, 1)
    ]
    assert chosen[0] == chosen[1] != chosen[2]
    assert [name[0] for name in chosen[0]] == ["a", "b", "a", "b"] and chosen[0] != [
        "a00.mp4",
        "b00.mp4",
        "a01.mp4",
        "b01.mp4",
    ]
    # A run that began before there was a seed keeps its clips.
    old = hold_out(source, [WIDE], 4, None)
    assert [source.entries[source.group(p.index)].path.name for p in old.picks] == [
        "a00.mp4",
        "a01.mp4",
        "a02.mp4",
        "a03.mp4",
    ]


# -- what is said of the data ------------------------------------------------------------------------------------------


def test_what_the_data_become_is_said_when_a_run_begins(tmp_path, undecoded, caplog):
    source, told = tiny_files(tmp_path, {"a": 30}), []
    say_what_the_data_are(source, [WIDE, TALL], hold_out(source, [WIDE, TALL], None, 0), told.append)
    assert told[0] == "27 clips of 27 files are trained on, 3 of 3 files measured."
    assert [line.split() for line in told[1:]] == [
        ["size", "files", "clips", "share", "of", "steps"],
        ["8x32x64", "27", "27", "100%"],
        ["8x64x32", "0", "0", "0%"],
    ]
    [warning] = caplog.messages
    assert "data.sizes.1 (8x64x32) gets no clip, and is never trained" in warning and "sizes_per_video" in warning


def test_an_explicit_number_that_leaves_less_than_half_is_told(tmp_path, undecoded, caplog):
    source, told = tiny_files(tmp_path, {"a": 10}), []
    say_what_the_data_are(source, [WIDE], hold_out(source, [WIDE], 8, 0), told.append)
    assert told[0] == "2 clips of 2 files are trained on, 8 of 8 files measured."
    assert "8 of 10 clips are held out" in caplog.text and "lower validation.clips" in caplog.text
    say_what_the_data_are(source, [WIDE], hold_out(source, [WIDE], 0, 0), told.append)
    assert "10 clips of 10 files are trained on, and none is measured" in told[-3]


def test_pictures_that_are_enlarged_or_cut_and_other_frame_rates_are_named(tmp_path):
    data = DataSettings(kind="videos", folder=str(tmp_path), sizes=(WIDE,))
    shapes = {"small": (16, 32), "tall": (128, 64), "good": (32, 64)}
    entries = [Entry(tmp_path / f"{name}.mp4", "x", Media(*shape, frames=8, fps=24)) for name, shape in shapes.items()]
    enlarged, cut, rate = MediaFolder(entries, data, False).cautions([WIDE], 16)
    assert (
        "1 videos are enlarged more than 1.25 times" in enlarged and "small.mp4 (16x32) at 32x64, 2 times" in enlarged
    )
    assert "1 videos keep less than 60% of their picture" in cut and "tall.mp4 (128x64) at 32x64, 25%" in cut
    assert "3 videos do not have the 16 frames a second" in rate and "set data.fps to 16: small.mp4 (24)" in rate
    assert MediaFolder(entries[2:], replace(data, fps=16), False).cautions([WIDE], 16) == []
    [faster] = MediaFolder(entries[2:], replace(data, fps=16), False).cautions([WIDE], 24)
    assert "data.fps is 16, and the model makes 24 frames a second" in faster and "faster" in faster
    [slower] = MediaFolder(entries[2:], replace(data, fps=24), False).cautions([WIDE], 16)
    assert "slower" in slower and "set data.fps to 16" in slower


def test_a_video_can_give_clips_in_every_size_that_it_fits(tmp_path):
    """Of 8 and 16 frames in one shape, 8 was never trained where all videos have 16."""
    media = Media(32, 64, frames=24)
    data = DataSettings(kind="videos", folder=str(tmp_path), sizes=(WIDE, TALL, LONG))
    entries = [Entry(tmp_path / "a.mp4", "x", media)]
    assert MediaFolder(entries, data, False).members(data.sizes) == {0: [], 1: [], 2: [0]}
    every = MediaFolder(entries, replace(data, sizes_per_video="all"), False)
    assert every.members(data.sizes) == {0: [0, 1, 2], 1: [], 2: [0]}
    assert hold_out(every, data.sizes, 0, 0).clips == frozenset()


def test_what_is_too_short_is_said_once_a_run(tmp_path, caplog):
    data = DataSettings(kind="videos", folder=str(tmp_path), sizes=(WIDE,))
    entries = [Entry(tmp_path / f"{n}.mp4", "x", Media(32, 64, frames=n)) for n in (4, 8)]
    source = MediaFolder(entries, data, False)
    for _ in range(3):
        source.members(data.sizes)
    assert caplog.messages == [
        "1 videos have less than 8 frames and are left out: 4.mp4 (4); the longest has 4: a size of so many "
        "frames, or fewer, takes it."
    ]


def test_videos_that_are_a_frame_too_short_are_told_what_would_fit(tmp_path, caplog):
    """10 seconds are 160 frames at 16 a second, and none of 161."""
    long = replace(WIDE, frames=161)
    data = DataSettings(kind="videos", folder=str(tmp_path), fps=16, sizes=(long,))
    media = {n: Media(32, 64, frames=n, fps=Fraction(30), seconds=Fraction(n, 30)) for n in (150, 300)}
    entries = [Entry(tmp_path / f"{n}.mp4", "x", each) for n, each in media.items()]
    with pytest.raises(ConfigError, match=r"161 frames of the .*: the longest has 160 at data.fps = 16: give"):
        MediaFolder(entries, data, False).members(data.sizes)
    assert "less than 161 frames at data.fps = 16 and are left out" in caplog.text


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_measured_clips_are_encoded_alone_and_measured_in_small_batches(video_folder):
    """However many there are, of whatever shapes; afterwards the encoders are let go of."""
    source, sizes = files(video_folder), (WIDE, TALL)
    held, encoder = hold_out(source, sizes, 8), Thumbnails("latents")
    latents = Latents(source, sizes, encoder, Letters(), None, held.clips)
    clips = MeasuredClips(source, held.picks, latents, keep_first_frames=True)
    assert encoder.calls == [(1, ("latents",))] * 8 and encoder.released == 1
    assert torch.equal(clips.first_frames[0], source.pixels(held.picks[0])[:, 0])
    seen = []

    def measure(batch, rng):
        seen.append([place.number for place in rng.places])
        assert "pixels" not in batch and len(batch["texts"]) == len(batch["latents"])
        return {"x": batch["latents"].mean()}

    made = clips.mean(measure, 4, HERE)
    assert seen == [[0, 1, 2, 3], [4, 5], [6, 7]]  # six wide ones, two tall ones
    wanted = torch.stack([source.pixels(pick).mean() for pick in held.picks]).mean()
    assert made["x"] == pytest.approx(float(wanted), abs=1e-5)
    # A size that takes fewer clips at a time in training takes no more of them here.
    latents.sizes, encoder.released = (WIDE, replace(TALL, batch_size=1)), 0
    seen.clear()
    MeasuredClips(source, held.picks, latents, keep_first_frames=False).mean(measure, 4, HERE)
    assert seen == [[0, 1, 2, 3], [4, 5], [6], [7]]
    none = MeasuredClips(source, (), latents, keep_first_frames=False)
    assert none.mean(measure, 4, HERE) == {} and encoder.released == 1


# -- encodings that are kept -------------------------------------------------------------------------------------------


def test_only_what_is_missing_is_encoded(tmp_path, copied, damage, caplog):
    """The second phase of an image-to-video model needs one part more than the first."""
    damage(copied / "d.mp4")
    source, cache = files(copied), TensorCache(tmp_path / "cache")
    first, second = Thumbnails("latents", "teacher"), Thumbnails("latents", "embeds")
    for encoder, parts in ((first, ("latents", "teacher")), (second, ("embeds",))):
        latents = Latents(source, (WIDE, TALL), encoder, Letters(), cache)
        latents.fill(HERE)
        assert set(encoder.calls) == {(1, parts)} and 9 <= len(encoder.calls) < 12
    lost = 12 - len(second.calls)
    assert f"{lost} of 12 clips cannot be decoded and are left out" in caplog.text
    assert sum(map(len, latents.members.values())) == 12 - lost


def test_nothing_can_be_encoded(tmp_path, copied):
    source = files(copied)
    for name in "abcd":
        (copied / f"{name}.mp4").write_bytes(b"damaged since")
    latents = Latents(source, (WIDE, TALL), Thumbnails("latents"), Letters(), TensorCache(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="none of the 12 clips can be decoded"):
        latents.fill(HERE)


def test_texts_take_a_bounded_number_of_bytes(tmp_path):
    """States of long prompts are megabytes. The encoder leaves the GPU after each use."""
    encoder = Letters()
    texts = Texts(encoder, None, limit=100)
    assert [text["states"].shape[0] for text in texts[["abcd", "ab"]]] == [4, 2]
    assert encoder.parked == 1 and len(texts[["abcd"]]) == 1 and encoder.calls == ["abcd", "ab"]
    texts[["abc"]]  # 96 bytes are there, under the limit
    texts[["ab", "a"]]
    assert (
        encoder.calls == ["abcd", "ab", "abc", "a"]
        and set(texts._known) == {("ab", ""), ("a", "")}
        and encoder.parked == 3
    )
