"""Files that nodes read and wrote, as `fingerprint_inputs` watches them."""

from __future__ import annotations

import shutil

from vidaccel.nodes import watched
from vidaccel.nodes.pipeline.tuning import PAGE, is_written
from vidaccel.nodes.watched import Watched, fingerprint, read, state_of


def test_what_came_through_a_link_is_watched_once_it_was_read(tmp_path, monkeypatch):
    monkeypatch.setattr(watched, "READ", Watched())
    file = tmp_path / "adapter.safetensors"
    file.write_text("trained")
    linked = [fingerprint(None, None)]
    assert read(str(file)) == file
    linked += [fingerprint(None, None), fingerprint(None, "a menu", None)]
    assert len({*linked}) == 1  # the second time the same inputs come, nothing is read anew
    file.write_text("trained anew")
    assert fingerprint(None, None) != linked[0]
    assert fingerprint(None, None) == fingerprint(None, None)
    read(file)
    changed = fingerprint(None, None)
    file.unlink()
    assert fingerprint(None, None) != changed


def test_a_place_that_another_node_has_read_since_is_still_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(watched, "READ", Watched())
    file = tmp_path / "adapter.safetensors"
    file.write_text("trained")
    read(file)
    linked = fingerprint(None, None)
    file.write_text("trained anew")
    read(file)  # of a path that was typed
    assert fingerprint(None, None) != linked


def test_one_place_is_looked_at_in_each_way(tmp_path, monkeypatch):
    monkeypatch.setattr(watched, "READ", Watched())

    def whole(folder):
        return len(list(folder.rglob("*")))

    def part(folder):
        return 0

    read(tmp_path, whole)
    read(tmp_path, part)
    linked = fingerprint(None, None)
    (tmp_path / "vae").mkdir()
    assert fingerprint(None, None) != linked


def test_what_was_typed_is_watched_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(watched, "READ", Watched())
    file, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for each in (file, other):
        each.write_text("trained")
    read(other)
    before = fingerprint(state_of(file), "", str(file))
    other.write_text("trained anew")
    assert fingerprint(state_of(file), "", str(file)) == before == state_of(file)


def test_a_folder_that_is_read_counts_as_its_state_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(watched, "READ", Watched())
    sizes = []
    read(tmp_path, lambda folder: sizes.append(len(list(folder.iterdir()))) or sizes[-1])
    before = fingerprint(None, None)
    (tmp_path / "new").write_text("")
    assert fingerprint(None, None) != before and sizes[-1] == 1


def test_a_folder_that_was_written_and_deleted(tmp_path):
    written, folder = Watched(), tmp_path / "tune"
    assert written.changes() == 0
    folder.mkdir()
    (folder / PAGE).write_text("")
    written.remember(folder, lambda: is_written(folder))
    assert written.changes() == 0
    shutil.rmtree(folder)
    assert written.changes() == 1 == written.changes()
    folder.mkdir()
    (folder / PAGE).write_text("")
    written.remember(folder, lambda: is_written(folder))
    assert written.changes() == 1
