"""Videos and images in one training: which file goes to which size, and a run of both on a real Wan pipeline."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_runs import recipe, write
from PIL import Image

from vidaccel.lora import run
from vidaccel.lora.config import ConfigError, build
from vidaccel.lora.data.dataset import open_dataset
from vidaccel.lora.data.sampler import ClipSampler, Pick
from vidaccel.lora.distributed.generators import Place
from vidaccel.lora.settings import DataSettings

SIZES = [
    {"frames": 1, "height": 64, "width": 96},
    {"frames": 1, "height": 96, "width": 64},
    {"frames": 9, "height": 32, "width": 64},
    {"frames": 9, "height": 64, "width": 32, "share": 0.5},
]


@pytest.fixture
def folder(tmp_path, video_folder) -> Path:
    """Four videos, two wide and two tall, and three pictures, one of them tall."""
    made = tmp_path / "both"
    shutil.copytree(video_folder, made)
    rows = (made / "metadata.jsonl").read_text().splitlines()
    for number, (height, width) in enumerate([(64, 96), (66, 100), (96, 64)]):
        Image.fromarray(np.full((height, width, 3), 50 * number + 50, np.uint8)).save(made / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": f"picture {number}"}))
    (made / "metadata.jsonl").write_text("\n".join(rows))
    return made


def settings(place: Path, **more) -> DataSettings:
    return build(DataSettings, {"kind": "mixed", "folder": str(place), "sizes": SIZES, "fps": 8, **more})


def test_images_go_to_the_sizes_of_one_frame_and_videos_to_the_others(folder):
    data = settings(folder)
    dataset = open_dataset(data, 0)
    members = dataset.members(data.sizes)
    assert {size: len(clips) for size, clips in members.items()} == {0: 2, 1: 1, 2: 4, 3: 4}  # two clips of each video
    for size, clips in members.items():
        shape = (data.sizes[size].frames, data.sizes[size].height, data.sizes[size].width)
        pixels = dataset.pixels(Pick(clips[0], shape, Place(0, 0, 1, 0)))
        assert pixels.shape == (3, *shape)
        assert dataset.caption(clips[0]).startswith("picture" if size < 2 else "video")
    grey = dataset.pixels(Pick(members[1][0], (1, 96, 64), Place(0, 0, 1, 0)))
    assert torch.allclose(grey, torch.tensor(150 / 127.5 - 1), atol=0.01)


def test_videos_that_are_too_short_are_told_the_sizes_of_videos(folder, caplog):
    """They were said to have less than 1 frames."""
    longer = [*SIZES[:2], {"frames": 40, "height": 32, "width": 64}, {"frames": 99, "height": 32, "width": 64}]
    data = settings(folder, sizes=longer, fps=None)
    dataset = open_dataset(data, 0)
    caplog.clear()
    assert [len(clips) for clips in dataset.members(data.sizes).values()] == [2, 1, 0, 0]
    [told] = caplog.messages
    assert told.startswith("4 videos have less than 40 frames and are left out: a.mp4 (")
    caplog.clear()
    assert any(dataset.members(data.sizes[:2]).values()) and not caplog.messages  # a phase of pictures alone
    with pytest.raises(ConfigError, match=r"no video in .* has the 40 frames of the shortest of the sizes"):
        dataset.members(data.sizes[2:])


def test_a_step_has_one_kind_and_shares_hold_against_the_number_of_clips(folder):
    data = settings(folder)
    sampler = ClipSampler(data.sizes, open_dataset(data, 0).members(data.sizes), 1)
    drawn = Counter(picks[0].size[0] for picks in sampler.micro_batches(0, 900))
    assert drawn[1] / 900 == pytest.approx(3 / (3 + 4 + 4 * 0.5), abs=0.05)


def test_pictures_are_those_of_a_folder_of_images_alone(folder):
    """So that a cache holds them once."""
    both = settings(folder)
    alone = settings(folder, kind="images", sizes=SIZES[:2])
    for data in (both, alone):
        dataset = open_dataset(data, 0)
        index = dataset.members(data.sizes)[1][0]
        found = dataset.identity(Pick(index, (1, 96, 64), Place(0, 0, 1, 0)))
        wanted = found if data is both else wanted  # noqa: F821
        assert found == wanted


@pytest.mark.parametrize("attention", ["dense", "radial"])
def test_both_are_trained_on(tmp_path, folder, text_base, attention, monkeypatch):
    seen = []
    file = write(
        tmp_path,
        text_base,
        data={"kind": "mixed", "folder": str(folder), "sizes": SIZES, "fps": 8, "clips": None},
        train={"steps": 8, "batch_size": 1},
        validation={"clips": 3, "prompts": []},
        attention={} if attention == "dense" else {"method": attention, "block_size": 8},
    )
    from vidaccel.lora.recipes.lora import FlowLora

    loss = FlowLora.loss

    def watched(self, model, batch, rng):
        seen.append(batch["latents"].shape[2])
        return loss(self, model, batch, rng)

    monkeypatch.setattr(FlowLora, "loss", watched)
    assert Path(run("lora", file)["lora"]).is_file()
    assert set(seen) == {1, 3} and len(seen) == 8


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"sizes": SIZES[:2]}, "kind is mixed: give at least one size of 1 frame, for the images, and one of more"),
        ({"sizes": SIZES[2:]}, "kind is mixed: give at least one size of 1 frame"),
        ({"folder": None}, "kind is mixed, so say where the videos and images are"),
    ],
)
def test_settings_that_do_not_fit(folder, data, words):
    with pytest.raises(ConfigError, match=words):
        settings(folder, **data)


def test_folders_and_models_that_do_not_fit(tmp_path, folder, video_folder, image_base):
    with pytest.raises(ConfigError, match="data.kind is mixed, and .* has videos alone: set it to videos"):
        open_dataset(settings(video_folder), 0)
    with pytest.raises(ConfigError, match="holds no videos and images"):
        (tmp_path / "empty").mkdir()
        open_dataset(settings(tmp_path / "empty"), 0)
    data = {"kind": "mixed", "folder": str(folder), "sizes": SIZES, "fps": 8, "clips": None}
    with pytest.raises(ConfigError, match="data.sizes.0: a clip of 1 frame has nothing behind its first frame"):
        recipe(write(tmp_path, image_base, data=data))
