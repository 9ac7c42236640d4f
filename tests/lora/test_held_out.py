"""Clips that are measured and not trained on, and encodings that are kept: with files and a tiny encoder."""

from __future__ import annotations

import shutil

import pytest
import torch

from vidaccel.lora.backbones.base import Encoder, TextEncoder
from vidaccel.lora.config import ConfigError
from vidaccel.lora.data.cache import TensorCache
from vidaccel.lora.data.demo import DemoScenes
from vidaccel.lora.data.folder import MediaFolder
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
