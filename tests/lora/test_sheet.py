"""The picture of the data that a run begins with."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from lora_runs import recipe, write
from PIL import Image

from vidaccel.lora.config import build
from vidaccel.lora.data.dataset import open_dataset
from vidaccel.lora.data.demo import DemoScenes
from vidaccel.lora.data.held_out import HeldOut, hold_out
from vidaccel.lora.data.sheet import FILE, shown_clips, write_sheet
from vidaccel.lora.settings import DataSettings, SizeSettings

WIDE, TALL, STILL = SizeSettings(5, 32, 64), SizeSettings(5, 64, 32), SizeSettings(1, 32, 64)
NONE = HeldOut(())


class Coloured:
    """Clips of two sizes, each frame in one colour: red by the clip, green by the frame; a wide one is damaged."""

    clips: ClassVar = {0: [0, 0, 1, 2, 3, 4, 5], 1: [6, 7]}  # the first one twice, as of a folder with repeats

    def members(self, sizes):
        return self.clips

    def caption(self, index):
        return f"clip {index}" if index else "a caption\nof several lines " * 20

    def pixels(self, pick):
        if pick.index == 5:
            raise OSError("five.mp4 is damaged")
        frames, height, width = pick.size
        clip = torch.full((3, frames, height, width), -1.0)
        clip[0] = pick.index / 4 - 1
        clip[1] = torch.linspace(-1, 1, frames)[:, None, None]
        return clip


def test_clips_are_shown_of_each_size_and_from_end_to_end():
    def shown(count: int, held: HeldOut = NONE) -> list[tuple[int, tuple[int, int, int]]]:
        return [(pick.index, pick.size) for pick in shown_clips(Coloured(), (WIDE, TALL), held, count)]

    wide, tall = (5, 32, 64), (5, 64, 32)
    assert shown(4) == [(0, wide), (5, wide), (6, tall), (7, tall)]
    assert shown(5) == [(0, wide), (2, wide), (5, wide), (6, tall), (7, tall)]
    assert [index for index, _ in shown(100)] == [*range(8)]
    assert [index for index, _ in shown(100, HeldOut((), frozenset({0, 6, 7})))] == [1, 2, 3, 4, 5]
    assert shown(1) == [(0, wide)] and shown(0) == []
    endless = list(shown_clips(DemoScenes(), (WIDE, TALL), NONE, 5))
    assert len({pick.index for pick in endless}) == 5
    assert Counter(pick.size for pick in endless) == {wide: 3, tall: 2}


def test_the_first_the_middle_and_the_last_frame_are_as_the_model_gets_them(tmp_path, caplog):
    file = write_sheet(Coloured(), (WIDE, TALL), NONE, 3, tmp_path / "run")
    assert file == tmp_path / "run" / FILE
    assert caplog.messages == ["five.mp4 is damaged; clips.png is without it."]
    with Image.open(file) as image:
        picture = np.asarray(image.convert("RGB"))
    colours = {tuple(colour) for colour in picture.reshape(-1, 3) if colour[2] == 0 and colour.max() > 0}
    assert {(0, 128, 0), (0, 255, 0), (191, 0, 0), (191, 128, 0), (191, 255, 0)} <= colours
    assert not any(colour[0] == 159 for colour in colours)  # of the damaged one
    assert (picture[0] == 255).all() and picture.shape[1] > 2 * 3 * 200


def test_where_there_is_nothing_to_show_there_is_no_picture(tmp_path, caplog):
    assert write_sheet(Coloured(), (WIDE, TALL), NONE, 0, tmp_path) is None
    all_but_five = HeldOut((), frozenset({0, 1, 2, 3, 4, 6, 7}))
    assert write_sheet(Coloured(), (WIDE, TALL), all_but_five, 8, tmp_path) is None
    (tmp_path / "a file").write_text("")
    assert write_sheet(Coloured(), (WIDE, TALL), NONE, 1, tmp_path / "a file") is None
    assert (
        caplog.messages[-1].startswith("the picture of the data could not be written to") and "goes on" in caplog.text
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]


def test_videos_and_pictures_of_a_folder(tmp_path, video_folder):
    data = build(
        DataSettings, {"kind": "videos", "folder": str(video_folder), "sizes": [vars(WIDE), vars(TALL)], "fps": 8}
    )
    dataset = open_dataset(data, 0)
    file = write_sheet(dataset, data.sizes, hold_out(dataset, data.sizes, 0, 0), 2, tmp_path)
    with Image.open(file) as image:
        greys = {colour[0] for _, colour in image.getcolors(2**20) if len(set(colour)) == 1}
    assert any(abs(grey - 16) < 3 for grey in greys)  # the middle of the first five frames


@pytest.mark.parametrize(("wanted", "there"), [(3, True), (0, False)])
def test_a_run_has_it_from_its_beginning_on(tmp_path, wanted, there, capsys):
    made = recipe(write(tmp_path, "demo", data={"contact_sheet": wanted}))
    assert not Path(made.config.out).exists()
    made.show_data(Path(made.config.out))
    assert (Path(made.config.out) / FILE).is_file() == there
    assert (f"What some of the clips look like: {made.config.out}/{FILE}" in capsys.readouterr().out) == there


def test_a_run_that_goes_on_leaves_the_picture_of_its_beginning(tiny_settings, tiny_recipe, run_tiny, monkeypatch):
    shown = []
    monkeypatch.setattr(tiny_recipe, "show_data", lambda self, folder: shown.append(folder))
    settings = tiny_settings()
    run_tiny(settings)
    assert shown == [Path(settings.out)]
    run_tiny(settings, "latest")
    assert len(shown) == 1
