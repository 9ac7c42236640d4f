"""Folders as people have them: which files are taken, and what their captions are."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from vidaccel.lora.config import ConfigError
from vidaccel.lora.data.captions import read_captions
from vidaccel.lora.data.decode import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from vidaccel.lora.data.files import media_files
from vidaccel.lora.data.folder import MediaFolder
from vidaccel.lora.data.held_out import hold_out
from vidaccel.lora.data.sampler import ClipSampler, without
from vidaccel.lora.settings import DataSettings, FolderSettings, SizeSettings

Reading = Callable[..., dict[str, str]]


@pytest.fixture
def reading(tmp_path) -> Reading:
    """Captions by name of the file, of a folder with these files, metadata (name -> content) and settings."""

    def read(*names: str, missing: str = "error", **contents: str | bytes) -> dict[str, str]:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        for name, content in contents.items():
            path = tmp_path / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        files = media_files(tmp_path, VIDEO_SUFFIXES, "videos")
        found = read_captions(tmp_path, files, missing)
        return {path.relative_to(tmp_path).as_posix(): text for path, text in found.items()}

    return read


def lines(*rows: dict) -> str:
    return "\n".join(map(json.dumps, rows))


# -- text files --------------------------------------------------------------------------------------------------------


def test_a_text_file_beside_each(reading):
    texts = {"a_dot_txt": "a cat, and a dog\n", "sub__b_dot_TXT": "\ufeffcafé\r\nat night\r\n", "README_dot_txt": "no"}
    assert reading("a.mp4", "sub/b.mov", **texts) == {"a.mp4": "a cat, and a dog", "sub/b.mov": "café\nat night"}


def test_a_text_file_in_another_unicode_form(reading, tmp_path):
    """macOS writes names apart, and editors write them composed."""
    (tmp_path / unicodedata.normalize("NFC", "café.txt")).write_text("x")
    name = unicodedata.normalize("NFD", "café.mp4")
    assert reading(name) == {name: "x"}


def test_text_files_of_no_file_are_named(reading, caplog):
    reading("a.mp4", a_dot_txt="x", b_dot_txt="y")
    assert "no file belongs to b.txt, which is not read" in caplog.text


def test_metadata_counts_and_text_files_fill_up(reading, caplog):
    table = lines({"file_name": "a.mp4", "text": "of the table"})
    texts = {"a_dot_txt": "another", "b_dot_txt": "beside"}
    assert reading("a.mp4", "b.mp4", metadata_dot_jsonl=table, **texts) == {"a.mp4": "of the table", "b.mp4": "beside"}
    assert "1 files have another caption in their .txt file, which is not read: a.mp4" in caplog.text


def test_of_two_tables_one_is_not_read(reading, caplog):
    table = lines({"file_name": "a.mp4", "text": "one"})
    found = reading("a.mp4", metadata_dot_jsonl=table, metadata_dot_csv="file_name,text\na.mp4,two\n")
    assert found == {"a.mp4": "one"} and "metadata.csv is not read: metadata.jsonl is there too" in caplog.text


@pytest.mark.parametrize("content", [b"caf\xe9", "café".encode("utf-16")])
def test_text_files_in_other_encodings_are_refused(reading, content):
    with pytest.raises(ConfigError, match=r"a.txt is not in UTF-8 .*save it in UTF-8"):
        reading("a.mp4", a_dot_txt=content)


# -- names -------------------------------------------------------------------------------------------------------------


def test_names_as_people_write_them(reading, tmp_path):
    composed, apart = unicodedata.normalize("NFC", "café.mp4"), unicodedata.normalize("NFD", "café.mp4")
    assert composed != apart
    names = {
        "./a.mp4": "a.mp4",
        "sub/../sub/b.mp4": "sub/b.mp4",
        "sub\\c.mp4": "sub/c.mp4",
        str(tmp_path / "sub" / "d.mp4"): "sub/d.mp4",
        "E.MP4": "e.mp4",
        composed: apart,
        " f.mp4 ": "f.mp4",
    }
    table = lines(*({"file_name": name, "text": f"for {file}"} for name, file in names.items()))
    assert reading(*names.values(), metadata_dot_jsonl=table) == {file: f"for {file}" for file in names.values()}


def test_the_exact_name_comes_first(reading):
    table = lines({"file_name": "a.mp4", "text": "small"}, {"file_name": "A.mp4", "text": "large"})
    assert reading("a.mp4", "A.mp4", metadata_dot_jsonl=table) == {"A.mp4": "large", "a.mp4": "small"}
    with pytest.raises(ConfigError, match=r"metadata.jsonl, line 1: a.MP4 could be A.mp4, a.mp4: rename one"):
        reading(metadata_dot_jsonl=lines({"file_name": "a.MP4", "text": "which"}))


def test_where_no_name_is_right_both_sides_are_shown(reading):
    with pytest.raises(ConfigError, match=r"no file in .* has a caption. It names x, y; there are a.mp4, b.mp4"):
        reading("a.mp4", "b.mp4", metadata_dot_csv="file_name,text\nx,one\ny,two\n")


def test_duplicates(reading, caplog):
    same = lines({"file_name": "a.mp4", "text": "x"}, {"file_name": "./a.mp4", "text": "x"})
    assert reading("a.mp4", metadata_dot_jsonl=same) == {"a.mp4": "x"} and "has 1 lines twice" in caplog.text
    other = lines({"file_name": "a.mp4", "text": "x"}, {"file_name": "./a.mp4", "text": "y"})
    with pytest.raises(ConfigError, match=r"line 2: ./a.mp4 has another caption than in line 1: keep one"):
        reading(metadata_dot_jsonl=other)


# -- CSV and JSON ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        'file_name,text\na.mp4,"one, two"\n',
        '\ufefffile_name,text\r\na.mp4,"one, two"\r\n',
        'text,file_name,more\n"one, two",a.mp4,7\n',
        ' File_Name , TEXT\n\na.mp4,"one, two"',
        "file_name,text\r" + 'a.mp4,"one, two"\r',
    ],
)
def test_tables_that_are_understood(reading, content):
    assert reading("a.mp4", metadata_dot_csv=content) == {"a.mp4": "one, two"}


def test_a_caption_of_several_lines_is_whole(reading):
    content = 'file_name,text\na.mp4,"one\ntwo ""three"""\nb.mp4,four\n'
    assert reading("a.mp4", "b.mp4", metadata_dot_csv=content) == {"a.mp4": 'one\ntwo "three"', "b.mp4": "four"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            "file_name,text\na.mp4,one, two\n",
            r"line 2: it has 3 columns \(a.mp4, one,  two\), and the header",
        ),
        ('file_name,text\na.mp4,"x\ny"\nb.mp4,one, two\n', "line 4: it has 3 columns"),
        ("a.mp4,one\nb.mp4,two\n", "line 1: the first line must be the header, .*; found: a.mp4, one"),
        ("file;caption\na.mp4;one\n", "line 1: the first line must be the header, .*; found: file;caption"),
        ("\nfile_name,caption\na.mp4,one\n", "line 2: .* found: file_name, caption"),
        ("file_name,text,text\na.mp4,one,two\n", "once each"),
        ('file_name,text\na.mp4,"one\nb.mp4,two\n', "line 2: no CSV: .*quotation mark"),
        ('file_name,text\na.mp4,"one" two\n', "line 2: no CSV: "),
        ("file_name,text\na.mp4,x\nb.mp4," + "x" * 131_073, r"line 3: a caption has more than 131,072 characters: sho"),
        ("file_name,text\na.mp4\n", "line 2: there is no text in it; found: file_name"),
        ("file_name,text\n,one\n", "line 2: there is no file_name in it"),
        (b"file_name,text\na.mp4,caf\xe9\n", "metadata.csv is not in UTF-8"),
    ],
)
def test_tables_that_are_refused(reading, content, words):
    with pytest.raises(ConfigError, match=words):
        reading("a.mp4", "b.mp4", metadata_dot_csv=content)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"file_name": "a.mp4", "caption": "x"}', "line 1: there is no text in it; found: file_name, caption"),
        ('\n{"file_name": "a.mp4", "text": ["x"]}', r"line 2: text of a.mp4 is \['x'\], but must be text"),
        ('{"file_name": "a.mp4", "text": "x", "text": "y"}', "line 1: no JSON: text is there twice"),
        ('{"file_name": 7, "text": "x"}', "line 1: there is no file_name in it: 7 is no name"),
        ('{"file_name": "\\u0000", "text": "x"}', "line 1: there is no file_name in it: .* is no name"),
        ('{"file_name": "\\ud83d.mp4", "text": "x"}', "line 1: there is no file_name in it: .* is no name"),
        (
            '\n{"file_name": "a.mp4", "text": "a cat \\ud83d runs"}',
            r"metadata.jsonl, line 2: text of a.mp4 has \\ud83d, which is half of a character: write the character",
        ),
    ],
)
def test_lines_that_are_refused(reading, content, words):
    with pytest.raises(ConfigError, match=words):
        reading("a.mp4", metadata_dot_jsonl=content)


def test_a_character_of_two_halves_is_whole(reading):
    assert reading("a.mp4", metadata_dot_jsonl=lines({"file_name": "a.mp4", "text": "😀"})) == {"a.mp4": "😀"}


def test_what_has_none_is_left_out_when_asked(reading, caplog):
    content = "file_name,text\na.mp4\nb.mp4,two\n"
    assert reading("a.mp4", "b.mp4", missing="skip", metadata_dot_csv=content) == {"b.mp4": "two"}
    assert "1 files have no caption and are left out: a.mp4" in caplog.text


# -- which files -------------------------------------------------------------------------------------------------------


def test_links_hidden_files_and_other_kinds(tmp_path, caplog):
    """What is left out is named; nothing of it ends the run."""
    inside, outside = tmp_path / "data", tmp_path / "elsewhere"
    (inside / ".git").mkdir(parents=True)
    outside.mkdir()
    for path in ("a.mp4", "b.GIF", "._a.mp4", "picture.png", "notes.pdf", "a.txt", "metadata.csv", ".git/c.mp4"):
        (inside / path).touch()
    (outside / "d.mov").touch()
    (inside / "folder.mp4").mkdir()
    os.symlink(outside, inside / "linked")
    os.symlink(inside, outside / "back")
    os.symlink(outside / "d.mov", inside / "e.mov")
    os.symlink(tmp_path / "gone.mp4", inside / "dangling.mp4")
    os.mkfifo(inside / "pipe.mp4")
    found = media_files(inside, VIDEO_SUFFIXES, "videos")
    assert [path.relative_to(inside).as_posix() for path in found] == ["a.mp4", "b.GIF", "linked/d.mov"]
    left = {record.getMessage().partition("because it ")[2] for record in caplog.records}
    assert left == {
        "is hidden: .git, ._a.mp4",
        "is none of the videos that can be read: notes.pdf, picture.png",
        "is a link to nothing: dangling.mp4",
        "is no plain file: pipe.mp4",
        "leads to a folder that was searched already: linked/back",
        "is a link to a file that is there already: e.mov",
    }


def test_a_folder_keeps_its_own_name_whatever_links_lead_to_it(reading, tmp_path, caplog):
    """Also to a link in a folder that is searched first, and to one that leads outside by two ways."""
    (tmp_path / "z_real" / "deep").mkdir(parents=True)
    os.symlink(tmp_path / "z_real", tmp_path / "a_link")
    (tmp_path / "b").mkdir()
    os.symlink(tmp_path / "z_real" / "deep", tmp_path / "b" / "link")
    names = {"z_real/one.mp4": "z_real/one.mp4", "a_link/two.mp4": "z_real/two.mp4"}
    names |= {"b/link/three.mp4": "z_real/deep/three.mp4", "a_link/deep/four.mp4": "z_real/deep/four.mp4"}
    table = lines(*({"file_name": name, "text": f"for {file}"} for name, file in names.items()))
    assert reading(*names.values(), metadata_dot_jsonl=table) == {file: f"for {file}" for file in names.values()}
    assert "that are not there" not in caplog.text
    assert "leads to a folder that was searched already: a_link, b/link" in caplog.text


def test_a_link_to_a_file_that_is_there_is_that_file(reading, tmp_path):
    """By whichever name its caption knows it, but not with two captions."""
    os.symlink(tmp_path / "z.mp4", tmp_path / "a.mp4")
    for name in ("a.mp4", "z.mp4"):
        table = lines({"file_name": name, "text": "x"})
        assert reading("z.mp4", metadata_dot_jsonl=table) == {"z.mp4": "x"}
    table = lines({"file_name": "z.mp4", "text": "x"}, {"file_name": "a.mp4", "text": "y"})
    with pytest.raises(ConfigError, match=r"line 2: a.mp4 has another caption than in line 1: keep one"):
        reading(metadata_dot_jsonl=table)


def test_many_names_are_counted(tmp_path, caplog):
    for number in range(5):
        (tmp_path / f"{number}.pdf").touch()
    assert media_files(tmp_path, IMAGE_SUFFIXES, "images") == []
    assert "0.pdf, 1.pdf, 2.pdf, ... (5 in all)" in caplog.text


def test_moving_gifs_are_videos_and_no_pictures(tmp_path, caplog):
    frames = [Image.new("RGB", (64, 32), (shade, 0, 0)) for shade in (10, 100, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:], duration=100)
    frames[0].save(tmp_path / "still.gif")
    for name in ("moving", "still"):
        (tmp_path / f"{name}.txt").write_text(name)
    pictures = {"kind": "images", "folder": str(tmp_path), "sizes": (SizeSettings(1, 32, 64),)}
    folder = MediaFolder.open(DataSettings(**pictures))
    assert folder.captions() == ["still"]
    assert "moving.gif cannot be read as a picture: it holds 3 frames or pages" in caplog.text
    videos = MediaFolder.open(DataSettings(kind="videos", folder=str(tmp_path), sizes=(SizeSettings(3, 32, 64),)))
    assert [entry.media.frames for entry in videos.entries] == [3, 1]


# -- several folders ---------------------------------------------------------------------------------------------------


@pytest.fixture
def two_folders(tmp_path) -> tuple[str, str]:
    """One picture in the first, two in the second, each with its own kind of captions."""
    for name in ("one/a", "two/b", "two/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 32)).save(tmp_path / f"{name}.png")
    (tmp_path / "one" / "a.txt").write_text("of a")
    (tmp_path / "two" / "metadata.csv").write_text("file_name,text\nb.png,of b\nc.png,of c\n")
    return str(tmp_path / "one"), str(tmp_path / "two")


def test_clips_come_as_often_as_their_folder_says(two_folders):
    size = SizeSettings(1, 32, 64)
    folders = (FolderSettings(two_folders[0], repeats=3), FolderSettings(two_folders[1]))
    folder = MediaFolder.open(DataSettings(kind="images", folders=folders, sizes=(size,)))
    assert folder.captions() == ["of a", "of b", "of c"]
    sampler = ClipSampler((size,), folder.members((size,)), 1)
    seen = [folder.caption(pick.index) for (pick,) in sampler.micro_batches(0, 10)]
    for round_number in (seen[:5], seen[5:]):
        assert sorted(round_number) == ["of a", "of a", "of a", "of b", "of c"]


def test_a_file_of_two_folders_counts_once(two_folders, caplog):
    folders = (FolderSettings(two_folders[1]), FolderSettings(two_folders[1], repeats=2))
    folder = MediaFolder.open(DataSettings(kind="images", folders=folders, sizes=(SizeSettings(1, 32, 64),)))
    assert len(folder.entries) == 2 and {entry.repeats for entry in folder.entries} == {1}
    assert "2 files are in several of data.folders and count for the first" in caplog.text


def spellings(folder: Path) -> dict[str, str]:
    """Other names of a folder, and of one that holds nothing but links to its files."""
    link, files = folder.with_name("link"), folder.with_name("files")
    link.symlink_to(folder, target_is_directory=True)
    files.mkdir()
    for path in folder.iterdir():
        (files / path.name).symlink_to(path)
    (files / "metadata.csv").unlink()
    (files / "metadata.csv").write_bytes((folder / "metadata.csv").read_bytes())
    return {
        "link": str(link),
        "files": str(files),
        "dots": f"{folder}/../{folder.name}",
        "relative": os.path.relpath(folder),
    }


@pytest.mark.parametrize("spelling", ["link", "files", "dots", "relative"])
def test_a_file_of_two_names_is_not_trained_on_and_measured(two_folders, spelling, caplog):
    size = SizeSettings(1, 32, 64)
    paths = (two_folders[1], spellings(Path(two_folders[1]))[spelling])
    folder = MediaFolder.open(
        DataSettings(kind="images", folders=tuple(map(FolderSettings, paths)), sizes=(size,)), random_crops=True
    )
    assert "2 files are in several of data.folders and count for the first" in caplog.text
    held = hold_out(folder, (size,), 1)
    measured = {folder.caption(pick.index) for pick in held.picks}
    trained = [folder.caption(index) for index in without(folder.members((size,)), held.clips)[0]]
    assert len(measured) == len(trained) == 1 and measured.isdisjoint(trained)


def test_a_folder_without_any_captions_is_left_out_when_asked(two_folders, caplog):
    (Path(two_folders[0]) / "a.txt").unlink()
    folders = tuple(map(FolderSettings, two_folders))
    settings = DataSettings(kind="images", folders=folders, sizes=(SizeSettings(1, 32, 64),))
    with pytest.raises(ConfigError, match="one has no captions: write a metadata.jsonl"):
        MediaFolder.open(settings)
    skipping = replace(settings, missing_captions="skip")
    assert MediaFolder.open(skipping).captions() == ["of b", "of c"]
    assert "one has no captions: write a metadata.jsonl" in caplog.text and "It is left out." in caplog.text
    with pytest.raises(ConfigError, match=r"^data.folder: no file in .*one has a caption; the log above says more"):
        MediaFolder.open(replace(skipping, folders=(), folder=two_folders[0]))


def test_the_setting_of_a_folder_is_named_by_its_number(two_folders, tmp_path):
    size = SizeSettings(1, 32, 64)
    (tmp_path / "empty").mkdir()
    for path, words in (("none", "none is no folder"), ("empty", "empty holds no images")):
        folders = tuple(map(FolderSettings, (*two_folders, str(tmp_path / path))))
        with pytest.raises(ConfigError, match=f"^data.folders.2: .*{words}"):
            MediaFolder.open(DataSettings(kind="images", folders=folders, sizes=(size,)))
    for picture in (*Path(two_folders[0]).glob("*.png"), *Path(two_folders[1]).glob("*.png")):
        picture.write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"^data.folders: none of the 3 images"):
        folders = tuple(map(FolderSettings, two_folders))
        MediaFolder.open(DataSettings(kind="images", folders=folders, sizes=(size,)))


def test_folders_that_do_not_go_together(two_folders):
    with pytest.raises(ConfigError, match="folder and folders are both given"):
        DataSettings(kind="images", folder="a", folders=(FolderSettings("b"),), sizes=(SizeSettings(1, 32, 64),))
    missing = (FolderSettings(two_folders[0]), FolderSettings(f"{two_folders[0]}/none"))
    with pytest.raises(ConfigError, match="one/none is no folder"):
        MediaFolder.open(DataSettings(kind="images", folders=missing, sizes=(SizeSettings(1, 32, 64),)))
