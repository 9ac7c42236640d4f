"""Many and large files: looked into with progress that is kept, by one process; decoded while others are encoded."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from row_encoders import Rows, Words

from vidaccel.lora.data.ahead import ahead
from vidaccel.lora.data.cache import TensorCache
from vidaccel.lora.data.dataset import open_dataset
from vidaccel.lora.data.decode import probe
from vidaccel.lora.data.demo import DemoScenes
from vidaccel.lora.data.folder import MediaFolder
from vidaccel.lora.data.identities import dataset_identity
from vidaccel.lora.data.latents import Latents
from vidaccel.lora.data.sampler import Pick
from vidaccel.lora.distributed.generators import Place
from vidaccel.lora.distributed.processes import Process
from vidaccel.lora.logs.progress import Progress
from vidaccel.lora.settings import DataSettings, SizeSettings

WIDE, TALL = SizeSettings(8, 32, 64), SizeSettings(8, 64, 32)
HERE = Process(torch.device("cpu"))
SIZE = SizeSettings(4, 32, 32)


def pick(index: int) -> Pick:
    return Pick(index, (SIZE.frames, SIZE.height, SIZE.width), Place(0, 0, 1, 0))


def data(folder: Path, **changes) -> DataSettings:
    return DataSettings(kind="videos", folder=str(folder), sizes=(WIDE, TALL), **changes)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ZeroDivisionError])
def test_a_look_into_many_files_that_is_stopped_is_kept(video_folder, tmp_path, monkeypatch, stop, capsys):
    """Nothing was written before the last file; and nothing said how far it was."""
    cached, asked = data(video_folder, cache=str(tmp_path / "cache")), []

    def look(path, kind):
        asked.append(path)
        if path.name == "d.mp4":
            raise stop
        return probe(path, kind)

    process = Process(torch.device("cpu"), progress=Progress(Console(file=io.StringIO()), seconds=0))
    with monkeypatch.context() as patch, pytest.raises(stop):
        patch.setattr("vidaccel.lora.data.media_index.probe", look)
        open_dataset(cached, 0, process=process)
    assert "looking into files: 3 of 4, " in capsys.readouterr().out
    asked.clear()
    monkeypatch.setattr(
        "vidaccel.lora.data.media_index.probe", lambda path, kind: asked.append(path) or probe(path, kind)
    )
    assert len(open_dataset(cached, 0).entries) == 4
    assert [path.name for path in asked] == ["d.mp4"]


def test_an_index_is_written_on_the_way(video_folder, tmp_path, monkeypatch):
    """For whoever kills it; and not for each file, since it is written whole."""
    written = []
    monkeypatch.setattr("vidaccel.lora.data.media_index._SAVED", 2)
    monkeypatch.setattr("vidaccel.lora.data.media_index._write", lambda file, index: written.append(len(index)))
    MediaFolder.open(data(video_folder, cache=str(tmp_path / "cache")))
    assert written == [2, 4]


def test_what_a_data_set_is_is_read_by_one_process(video_folder, monkeypatch):
    """Each of eight read all files from beginning to end, one after the other."""
    here = Process(torch.device("cpu"))
    wanted = dataset_identity(MediaFolder.open(data(video_folder)), (WIDE, TALL), process=here)
    opened, other = MediaFolder.open(data(video_folder)), Process(torch.device("cpu"), 1, 2)
    monkeypatch.setattr("vidaccel.lora.data.folder.content", lambda path: pytest.fail("read by another one"))
    monkeypatch.setattr(Process, "wait", lambda self: None)
    monkeypatch.setattr(
        torch.distributed, "broadcast_object_list", lambda told, *_, **__: told.__setitem__(0, "what it is")
    )
    assert dataset_identity(opened, (WIDE, TALL), process=other) == "what it is"
    assert len(wanted) == 16


@pytest.mark.parametrize(("workers", "ahead"), [(0, [0] * 6), (2, [2, 2, 2, 2, 1])])
def test_clips_are_decoded_while_others_are_encoded(tmp_path, workers, ahead):
    """It was strictly in turn: a GPU waited for each video. One that does not decode is left out as before."""
    decoded, seen = [], []

    class Slow(DemoScenes):
        def pixels(self, pick):
            decoded.append(pick.index)
            if workers and pick.index == 5:
                raise OSError("5 is damaged")
            return super().pixels(pick)

    class Watching(Rows):
        def encode(self, pixels, parts=None):
            deadline = time.monotonic() + 10
            while len(decoded) < min(6, self.clips + 1 + workers) and time.monotonic() < deadline:
                time.sleep(0.01)
            seen.append(len(decoded) - self.clips - 1)
            return super().encode(pixels, parts)

    encoder = Watching()
    made = Latents(Slow(clips=6), (SIZE,), encoder, Words(), TensorCache(tmp_path), workers=workers)
    made.fill(HERE)
    assert sorted(decoded) == list(range(6))
    assert seen == ahead
    assert made.members == {0: list(range(6 - bool(workers)))}
    for index in made.members[0]:
        assert torch.equal(made.load(pick(index))["latents"], DemoScenes(clips=6).pixels(pick(index)).mean(dim=3))


def test_work_ahead_is_in_order_and_bounded():
    begun, threads = [], 2

    def make(number: int) -> int:
        begun.append(number)
        return -number

    made = ahead(make, range(100), threads, 4)
    for number in range(10):
        assert next(made) == -number
    assert len(begun) <= 10 + 4
    made.close()
    assert len(begun) <= 10 + 4
    assert list(ahead(make, range(3), 0, 1)) == list(ahead(make, range(3), 2, 1)) == [0, -1, -2]
