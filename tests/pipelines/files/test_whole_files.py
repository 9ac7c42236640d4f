"""Files that appear whole or not at all: what an interrupted write leaves, and what a failed one says."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import stat
from pathlib import Path

import pytest

from vidaccel.pipelines.files.json_files import write_json
from vidaccel.pipelines.files.whole_files import NotWritten, staged, write_bytes


def test_interrupted_while_writing(tmp_path):
    """Until the block ends the data lies in the same folder under another name, hidden; then it is gone."""

    def write():
        with staged(tmp_path / "clip.mp4") as temporary:
            temporary.write_bytes(b"half")
            assert temporary.parent == tmp_path
            assert temporary.name.startswith(".")
            assert not (tmp_path / "clip.mp4").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert list(tmp_path.iterdir()) == []
    write_bytes(b"whole", tmp_path / "clip.mp4")
    assert (tmp_path / "clip.mp4").read_bytes() == b"whole"


@pytest.fixture
def small_files():
    """The system lets this process write files of 4096 bytes at the most, and then names no file either."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_could_not_be_written_is_named_and_leaves_the_old(tmp_path, small_files):
    file = write_bytes(b"old", tmp_path / "page.html")
    with pytest.raises(NotWritten) as caught:
        write_bytes(bytes(5000), file)
    assert str(caught.value).startswith(f"{file} could not be written: [Errno {errno.EFBIG}] ")
    assert str(caught.value).endswith(" MiB are free there.")
    assert [left.read_bytes() for left in tmp_path.iterdir()] == [b"old"]
    with pytest.raises(NotWritten, match=f"^{file} could not be written"):
        write_json(file, "x" * 5000)
    assert file.read_bytes() == b"old"
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.path, str(again.reason)) == (file, str(caught.value.reason))


def test_a_link_stays_and_a_file_keeps_its_mode(tmp_path):
    (tmp_path / "kept").mkdir()
    file, link = tmp_path / "kept" / "a.json", tmp_path / "a.json"
    link.symlink_to(file)
    write_bytes(b"first", link)  # which leads to nothing yet
    file.chmod(0o640)
    write_bytes(b"second", link)
    assert link.is_symlink() and file.read_bytes() == b"second"
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["a.json"]


def test_what_is_no_file_is_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_bytes(b"whole", pipe)
        assert os.read(reader, 9) == b"whole" and stat.S_ISFIFO(pipe.stat().st_mode)
    finally:
        os.close(reader)
    ends = os.pipe()  # of which the link in /dev/fd leads to no path
    write_bytes(b"whole", f"/dev/fd/{ends[1]}")
    assert os.read(ends[0], 9) == b"whole"
    for end in ends:
        os.close(end)
    write_bytes(b"gone", "/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_place_that_is_not_there(tmp_path):
    with pytest.raises(NotWritten, match=f"^{tmp_path / 'none' / 'a.json'} could not be written: "):
        write_bytes(b"{}", Path(tmp_path) / "none" / "a.json")
