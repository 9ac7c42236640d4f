"""The tables of the command line: what they show of names that a terminal's markup would read otherwise."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("name", ["clip [v2].mp4", "d[/x].mp4", "[red]clip.mp4", "a:warning:b.mp4"])
def test_names_of_files_are_shown_as_they_are(vidaccel, tiny_model, tmp_path, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "300")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    size = ("--frames", 5, "--height", 32, "--width", 32, "--steps", 1, "--device", "cpu")
    result = vidaccel("generate", "dot", "--model", tiny_model, *size, "--method", "dense", "--out", tmp_path / name)
    assert result.exit_code == 0, (result.output, result.exception)
    assert str(tmp_path / name) in result.stdout
