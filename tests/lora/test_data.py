"""Plans, scenes, folders of videos and images."""

from __future__ import annotations

import json
import logging
import resource
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vidaccel.demo import world
from vidaccel.generation.media.files import Cut, Media, Undecodable
from vidaccel.lora.checkpoints.checkpoint import CheckpointError
from vidaccel.lora.config import ConfigError
from vidaccel.lora.data.captions import read_captions
from vidaccel.lora.data.dataset import open_dataset, sturdy_pixels
from vidaccel.lora.data.decode import probe, read_clip
from vidaccel.lora.data.demo import DemoScenes
from vidaccel.lora.data.folder import MediaFolder
from vidaccel.lora.data.identities import dataset_identity
from vidaccel.lora.data.sampler import ClipSampler, Pick, nearest_size, without
from vidaccel.lora.distributed.generators import Generators, Place
from vidaccel.lora.distributed.processes import Process
from vidaccel.lora.logs.pictures import write_video
from vidaccel.lora.settings import DataSettings, SizeSettings

WIDE, TALL = SizeSettings(8, 32, 64), SizeSettings(8, 64, 32)
PLACE = Place(0, 0, 1, 7)


def picks(sampler: ClipSampler, steps: int, process: int = 0) -> list[list[Pick]]:
    return list(sampler.micro_batches(process, steps))


# -- sampler and generators --------------------------------------------------------------------------------------------


def test_every_clip_is_seen_once_a_round():
    sampler = ClipSampler([WIDE], {0: range(6)}, batch_size=2, seed=1)
    seen = [pick.index for batch in picks(sampler, 6) for pick in batch]
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))
    assert seen[:6] != seen[6:]


def test_epochs():
    """How often each clip was shown; of sizes with other numbers of clips a step, on average."""
    assert ClipSampler([WIDE], {0: range(6)}, batch_size=2, accumulate=3).epochs(2) == 2
    assert ClipSampler([WIDE], None, batch_size=2).epochs(2) is None
    sampler = ClipSampler([WIDE, replace(TALL, batch_size=3)], {0: range(30), 1: range(30, 60)}, batch_size=1)
    shown = sum(len(batch) for batch in picks(sampler, 900))
    assert sampler.epochs(900) == 30 == pytest.approx(shown / 60, rel=0.05)


def test_processes_and_micro_steps_share_one_plan():
    """The clips of a step, their places and seeds do not depend on how they are spread."""
    one = picks(ClipSampler([WIDE], {0: range(20)}, batch_size=8, seed=3), 3)
    parts = ClipSampler([WIDE], {0: range(20)}, batch_size=2, accumulate=2, processes=2, seed=3)
    spread = [list(parts.micro_batches(process, 3)) for process in (0, 1)]
    for step in range(3):
        joined = [pick for micro in range(2) for process in (0, 1) for pick in spread[process][2 * step + micro]]
        assert joined == one[step]


def test_a_plan_goes_on_from_any_step():
    sampler = ClipSampler([WIDE, TALL], {0: range(5), 1: range(5, 12)}, batch_size=2, accumulate=2, seed=3)
    assert list(sampler.micro_batches(0, 9, first=4)) == list(sampler.micro_batches(0, 9))[8:]


def test_a_step_has_one_size_and_sizes_come_by_their_clips():
    sampler = ClipSampler([WIDE, TALL], {0: range(3), 1: range(3, 12)}, batch_size=2, seed=3)
    batches = picks(sampler, 400)
    assert all(len({pick.size for pick in batch}) == 1 for batch in batches)
    assert all((pick.index < 3) == (pick.size == (8, 32, 64)) for batch in batches for pick in batch)
    assert 60 <= sum(batch[0].size == (8, 32, 64) for batch in batches) <= 140


def test_shares_and_batch_sizes_of_endless_clips():
    small, large = SizeSettings(4, 32, 32, batch_size=6, share=3), SizeSettings(8, 64, 64)
    sampler = ClipSampler([small, large], None, batch_size=1, seed=3)
    count = Counter((batch[0].size, len(batch)) for batch in picks(sampler, 400))
    assert set(count) == {((4, 32, 32), 6), ((8, 64, 64), 1)}
    assert 270 <= count[(4, 32, 32), 6] <= 330
    seen = [pick.index for batch in picks(sampler, 400) for pick in batch]
    assert len(set(seen)) == len(seen)


def test_no_clips():
    with pytest.raises(ValueError, match="no clips"):
        ClipSampler([WIDE], {0: []}, 1)
    assert without({0: [1, 2, 3]}, [2]) == {0: [1, 3]} and without(None, [2]) is None


def test_nearest_size():
    long = SizeSettings(16, 32, 64)
    assert nearest_size([WIDE, TALL, long], 720, 1280, 100) == 2
    assert nearest_size([WIDE, TALL, long], 720, 1280, 10) == 0
    assert nearest_size([WIDE, TALL], 1280, 720, 10) == 1
    assert nearest_size([WIDE, TALL], 1280, 720, 7) is None


def test_draws_are_those_of_the_clips():
    places = [Place(0, number, 4, 100 + number) for number in range(4)]
    whole, parts = Generators(places), [Generators(places[:1]), Generators(places[1:])]
    for draw in (lambda d: d.normal(2, 3), lambda d: d.uniform(), lambda d: d.stratified()):
        assert torch.equal(draw(whole), torch.cat([draw(part) for part in parts]))


def test_stratified_draws_are_one_a_part():
    places = [Place(0, number, 16, number) for number in range(16)]
    assert (Generators(places).stratified() * 16).long().tolist() == list(range(16))


# -- the demo world ----------------------------------------------------------------------------------------------------


def test_scenes_of_full_length_are_those_of_the_world():
    scenes = DemoScenes()
    clip = scenes.pixels(Pick(42, (32, 32, 32), PLACE))
    assert torch.equal(clip, world.render(world.sample_scene(42), 32, 32, 32).transpose(0, 1) * 2 - 1)
    assert scenes.caption(42) == world.sample_scene(42).caption in world.training_captions()
    assert scenes.members([WIDE]) is None


def test_finite_scenes():
    scenes = DemoScenes(clips=5, zoom=(1.0, 2.0), seed=3)
    assert scenes.members([WIDE, TALL]) == {0: range(5), 1: range(5)}
    assert {scenes.caption(i) for i in range(5)} == set(scenes.captions())
    pick = Pick(2, (8, 32, 32), PLACE)
    assert torch.equal(scenes.pixels(pick), scenes.pixels(pick))
    assert scenes.identity(pick) != scenes.identity(Pick(3, (8, 32, 32), PLACE)) != DemoScenes(5).identity(pick)


# -- files -------------------------------------------------------------------------------------------------------------


def data(folder, **changes) -> DataSettings:
    values = {"kind": "videos", "folder": str(folder), "sizes": (WIDE, TALL), **changes}
    return DataSettings(**values)


def levels(clip: torch.Tensor) -> list[int]:
    """The grey level of each frame."""
    return ((clip.mean(dim=(0, 2, 3)) + 1) * 127.5).round().int().tolist()


def test_videos_are_cut_into_clips(video_folder):
    folder = MediaFolder.open(data(video_folder))
    members = folder.members((WIDE, TALL))
    assert {size: len(indices) for size, indices in members.items()} == {0: 6, 1: 6}
    assert folder.captions() == ["video a", "video b", "video c", "video d"]
    for number, index in enumerate(members[0][:3]):
        clip = folder.pixels(Pick(index, (8, 32, 64), PLACE))
        assert clip.shape == (3, 8, 32, 64) and clip.min() >= -1 and clip.max() <= 1
        wanted = np.arange(number * 8, number * 8 + 8) * 8
        assert np.abs(np.array(levels(clip)) - wanted).max() <= 2, number
        assert folder.caption(index) == "video a"


def test_frames_per_second(video_folder):
    folder = MediaFolder.open(data(video_folder, fps=4.0))
    members = folder.members((WIDE,))
    assert len(members[0]) == 4  # 12 frames at 4 fps: one clip a video
    clip = folder.pixels(Pick(members[0][0], (8, 32, 64), PLACE))
    steps = np.diff(levels(clip))
    assert np.abs(steps - 16).max() <= 2


def test_random_crops_follow_from_the_seed(video_folder):
    folder = MediaFolder.open(data(video_folder), random_crops=True)
    size = (4, 16, 16)
    clips = [folder.pixels(Pick(0, size, Place(0, 0, 1, seed))) for seed in (1, 1, 2, 3, 4)]
    assert torch.equal(clips[0], clips[1])
    assert len({tuple(levels(clip)) for clip in clips}) > 2


def test_clips_per_video(video_folder):
    assert len(MediaFolder.open(data(video_folder, clips=2)).members((WIDE,))[0]) == 8


def test_content_is_what_counts_for_the_cache(video_folder, tmp_path):
    first = MediaFolder.open(data(video_folder))
    shutil.copytree(video_folder, tmp_path / "moved")
    second = MediaFolder.open(data(tmp_path / "moved"))
    pick = Pick(0, (8, 32, 64), PLACE)
    assert first.identity(pick) == second.identity(pick) != first.identity(Pick(1, (8, 32, 64), PLACE))
    assert first.identity(pick) != first.identity(Pick(0, (4, 32, 64), PLACE))
    other = MediaFolder(first.entries, replace(first.data, fps=4.0), random_crops=False)
    assert first.identity(pick) != other.identity(pick)


def test_what_was_looked_at_is_remembered(video_folder, tmp_path, monkeypatch):
    cached = data(video_folder, cache=str(tmp_path / "cache"))
    first = MediaFolder.open(cached)
    pick = Pick(0, (8, 32, 64), PLACE)
    identity = MediaFolder.open(data(video_folder)).identity(pick)
    monkeypatch.setattr("vidaccel.lora.data.media_index.probe", lambda path, kind: pytest.fail("looked again"))
    monkeypatch.setattr("vidaccel.lora.data.media_index.content", lambda path: pytest.fail("read again"))
    monkeypatch.setattr("vidaccel.lora.data.folder.content", lambda path: pytest.fail("read again"))
    assert MediaFolder.open(cached).entries == first.entries
    assert MediaFolder.open(cached).identity(pick) == identity
    (tmp_path / "cache" / "media.json").write_text("{")
    with pytest.raises(pytest.fail.Exception):
        MediaFolder.open(cached)


NOT_WHOLE = {
    "no media": lambda facts: facts.pop("media"),
    "no content": lambda facts: facts.pop("content"),
    "no frames": lambda facts: facts["media"].pop("frames"),
    "more": lambda facts: facts["media"].update(more=1),
    "text": lambda facts: facts["media"].update(height="32"),
    "nothing": lambda facts: facts["media"].update(width=None),
    "no height": lambda facts: facts["media"].update(height=0),
    "no fraction": lambda facts: facts["media"].update(fps="8/0"),
    "a list": lambda facts: facts.update(media=[]),
}


@pytest.mark.parametrize("damage", NOT_WHOLE)
def test_what_is_not_remembered_whole_is_looked_up_again(video_folder, tmp_path, monkeypatch, damage):
    cached = data(video_folder, cache=str(tmp_path / "cache"))
    first = MediaFolder.open(cached)
    file = tmp_path / "cache" / "media.json"
    whole = json.loads(file.read_text())
    damaged = json.loads(file.read_text())
    NOT_WHOLE[damage](next(iter(damaged.values())))
    file.write_text(json.dumps(damaged))
    looked = []
    monkeypatch.setattr(
        "vidaccel.lora.data.media_index.probe", lambda path, kind: (looked.append(path), probe(path, kind))[1]
    )
    assert MediaFolder.open(cached).entries == first.entries
    assert len(looked) == 1 and json.loads(file.read_text()) == whole


def test_an_index_that_has_everything_is_not_written(video_folder, tmp_path):
    """Another run may read it, and the folder may be read-only."""
    cached = data(video_folder, cache=str(tmp_path / "cache"))
    MediaFolder.open(cached)
    file = tmp_path / "cache" / "media.json"
    before = file.stat()
    MediaFolder.open(cached)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("kind", ["demo", "videos"])
@pytest.mark.parametrize("place", ["file", "file/cache"])
def test_a_cache_in_the_place_of_a_file_is_refused_first(video_folder, tmp_path, monkeypatch, kind, place):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("vidaccel.lora.data.media_index.probe", lambda path, kind: pytest.fail("looked into files"))
    settings = data(video_folder, kind=kind, cache=str(tmp_path / place))
    with pytest.raises(ConfigError, match=rf"data.cache: .*{place} cannot be a folder, because .*file is a file: name"):
        open_dataset(settings, 0)


def test_an_index_that_cannot_be_read_or_written(video_folder, tmp_path):
    (tmp_path / "cache" / "media.json").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"data.cache: .*media.json cannot be read: .*Correct that, or remove it"):
        MediaFolder.open(data(video_folder, cache=str(tmp_path / "cache")))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        with pytest.raises(CheckpointError, match="the cache .*full cannot be written: .*choose another data.cache"):
            MediaFolder.open(data(video_folder, cache=str(tmp_path / "full")))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "full").iterdir()) == []


def test_files_that_were_not_read_whole_are_told_apart(video_folder, tmp_path):
    """As `autoencoder` compares them on a resume: wherever they lie, but not other ones."""
    shutil.copytree(video_folder, tmp_path / "videos")

    def name(folder: Path) -> str:
        opened = MediaFolder.open(data(folder), random_crops=True, need_captions=False)
        return dataset_identity(opened, (WIDE, TALL), pixels=False)

    before = name(tmp_path / "videos")
    assert before == name(video_folder) == name((tmp_path / "videos").rename(tmp_path / "moved"))
    write_video(torch.zeros(3, 24, 32, 64), tmp_path / "moved" / "a.mp4", fps=8)  # of as many frames, as large
    assert name(tmp_path / "moved") != before


@pytest.fixture
def damaged(video_folder, tmp_path):
    """The folder with a file that is no video."""
    folder = tmp_path / "damaged"
    shutil.copytree(video_folder, folder)
    (folder / "a.mp4").write_bytes(b"no video")
    return folder


def test_videos_that_do_not_decode_are_named_and_counted(damaged, caplog):
    folder = MediaFolder.open(data(damaged))
    assert [entry.path.name for entry in folder.entries] == ["b.mp4", "c.mp4", "d.mp4"]
    assert "a.mp4 cannot be decoded" in caplog.text
    assert "1 of 4 videos" in caplog.text


def test_another_clip_takes_the_place_of_a_damaged_one(damaged, caplog):
    folder = MediaFolder.open(data(damaged))
    members = folder.members((WIDE,))
    (damaged / "b.mp4").write_bytes(b"damaged since")
    caplog.set_level(logging.WARNING)
    pixels, index = sturdy_pixels(folder, Pick(members[0][0], (8, 32, 64), PLACE), members, (WIDE,))
    assert pixels.shape == (3, 8, 32, 64) and folder.caption(index) in ("video c", "video d")
    assert "b.mp4 cannot be decoded" in caplog.text and "another clip takes its place" in caplog.text


def test_nothing_decodes(damaged):
    for name in "bcd":
        (damaged / f"{name}.mp4").write_bytes(b"no video")
    with pytest.raises(ConfigError, match="none of the 4 videos"):
        MediaFolder.open(data(damaged))


def test_a_video_that_is_shorter_than_its_header_says(video_folder):
    path = video_folder / "a.mp4"
    media = probe(path, "videos")
    assert (media.height, media.width, media.frames, media.fps) == (32, 64, 24, 8.0)
    with pytest.raises(Undecodable, match="a.mp4 cannot be decoded: it ends after 4 of the 8 frames"):
        read_clip(path, media, Cut(20, 8, None, 32, 64), "videos")


def test_cuts_cover_and_stay_inside():
    cut = Cut(0, 1, None, 32, 32, top=1.0, left=0.0)
    media = Media(64, 128)
    assert cut.scaled(media) == (32, 64) and cut.corner((32, 64)) == (0, 0)
    assert Cut(0, 1, None, 32, 32, enlarge=2, top=1.0, left=1.0).corner((64, 128)) == (32, 96)


def test_clips_are_scaled_and_cut_from_the_middle(video_folder, tmp_path):
    """A picture with a white middle third, at half its size."""
    import imageio.v2 as imageio

    picture = np.zeros((64, 192, 3), np.uint8)
    picture[:, 64:128] = 255
    with imageio.get_writer(tmp_path / "a.mp4", fps=8, macro_block_size=2) as writer:
        for _ in range(4):
            writer.append_data(picture)
    media = probe(tmp_path / "a.mp4", "videos")
    clip = read_clip(tmp_path / "a.mp4", media, Cut(0, 4, None, 32, 32), "videos")
    assert clip.shape == (3, 4, 32, 32) and clip[..., 2:-2].mean() > 0.95
    left = read_clip(tmp_path / "a.mp4", media, Cut(0, 4, None, 32, 32, left=0.0), "videos")
    assert left.mean() < -0.95


def test_images(tmp_path):
    from PIL import Image

    for name, level in (("a", 0), ("b", 255)):
        Image.new("RGB", (60, 40), (level,) * 3).save(tmp_path / f"{name}.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,black\nb.png,white\nbad.png,nothing\n")
    size = SizeSettings(1, 32, 32)
    dataset = open_dataset(DataSettings(kind="images", folder=str(tmp_path), sizes=(size,)), 0)
    assert dataset.captions() == ["black", "white"]
    clips = [dataset.pixels(Pick(index, (1, 32, 32), PLACE)) for index in dataset.members((size,))[0]]
    assert [clip.mean().item() for clip in clips] == [-1, 1] and clips[0].shape == (3, 1, 32, 32)


def test_pictures_are_shown_as_their_exif_says(tmp_path):
    from PIL import Image

    picture = Image.new("RGB", (64, 32), "black")
    picture.paste("white", (0, 0, 32, 32))
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter, clockwise
    for name in ("a.jpg", "a.png"):
        picture.save(tmp_path / name, exif=exif)
        media = probe(tmp_path / name, "images")
        assert (media.height, media.width) == (64, 32)
        clip = read_clip(tmp_path / name, media, Cut(0, 1, None, 64, 32), "images")
        assert clip[:, :, :24].min() > 0.9 and clip[:, :, 40:].max() < -0.9


def test_a_picture_too_large_to_be_true_is_left_out(tmp_path, monkeypatch):
    """PIL's error for it is no OSError."""
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)
    with pytest.raises(Undecodable, match="a.png has 4,096 pixels: at most 128 are read. Give a smaller one"):
        probe(tmp_path / "a.png", "images")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (b'{"file_name": "a.mp4", "text": "caf\xe9"}', "metadata.jsonl is not in UTF-8 .*save it in UTF-8"),
        (None, "has no captions: write a metadata.jsonl or metadata.csv"),
        (['{"file_name": "a.mp4", "text": "x"}'], r"1 of 2 files have no caption \(b.mp4\): write them, or set"),
        (['{"file_name": "a.mp4"}'], "line 1: there is no text in it; found: file_name"),
        (['{"file_name": "a.mp4", "text": ""}', '{"file_name": "b.mp4", "text": " "}'], r"no file in .* has a caption"),
        (['{"file_name": "a.mp4"'], "line 1: no JSON"),
        (['{"text": "x"}'], "line 1: there is no file_name"),
        (["[1]"], "line 1: must be an object"),
    ],
)
def test_bad_captions(tmp_path, metadata, words):
    files = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    if metadata is not None:
        content = metadata if isinstance(metadata, bytes) else "\n".join(metadata).encode()
        (tmp_path / "metadata.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        read_captions(tmp_path, files)


def test_files_without_captions_may_be_left_out(tmp_path, caplog):
    files = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    rows = [{"file_name": "a.mp4", "text": "x"}, {"file_name": "gone.mp4", "text": "y"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_captions(tmp_path, files, "skip") == {files[0]: "x"}
    assert "1 files have no caption and are left out: b.mp4" in caplog.text
    assert "names 1 files that are not there: gone.mp4" in caplog.text
    assert read_captions(tmp_path, files[1:], "skip") == {}
    assert "no file in" in caplog.text and "It names a.mp4, gone.mp4; there are b.mp4. It is left out." in caplog.text


def test_folders_that_cannot_be_used(tmp_path, video_folder):
    with pytest.raises(ConfigError, match="is no folder"):
        MediaFolder.open(data(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"holds no videos \(.mp4"):
        MediaFolder.open(data(tmp_path))
    with pytest.raises(ConfigError, match="no video in .* has the 100 frames"):
        MediaFolder.open(data(video_folder)).members((SizeSettings(100, 32, 32),))
    with pytest.raises(ConfigError, match="folder is missing: kind is videos"):
        DataSettings(kind="videos")


def test_one_process_says_what_there_is_to_say_of_files(video_folder, caplog):
    """Each looks at the same files, and said the same."""
    for index in (1, 0):
        process = Process(torch.device("cpu"), index, 2)
        opened = open_dataset(data(video_folder, fps=16.0), 0, process=process)
        opened.members((SizeSettings(999, 32, 64), SizeSettings(8, 64, 32), WIDE))
        assert ("less than data.fps = 16" in caplog.text) == (index == 0)
