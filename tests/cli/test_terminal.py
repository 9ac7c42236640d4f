"""What commands print: names that a terminal's markup would read otherwise, and where nothing can be printed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vidaccel.cli.terminal import then_printed


@pytest.mark.parametrize("name", ["clip [v2].mp4", "d[/x].mp4", "[red]clip.mp4", "a:warning:b.mp4"])
def test_names_of_files_are_shown_as_they_are(vidaccel, tiny_model, tmp_path, monkeypatch, name):
    """In one piece, too, where there is no terminal: they were folded at 80 columns."""
    monkeypatch.delenv("COLUMNS", raising=False)
    name = f"{'of a long name ' * 5}/{name}"
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    size = ("--frames", 5, "--height", 32, "--width", 32, "--steps", 1, "--device", "cpu")
    result = vidaccel("generate", "dot", "--model", tiny_model, *size, "--method", "dense", "--out", tmp_path / name)
    assert result.exit_code == 0, (result.output, result.exception)
    assert str(tmp_path / name) in result.stdout


@pytest.mark.parametrize(
    "closed", [pytest.param(True, id="a closed pipe"), pytest.param(False, id="a full disk", marks=pytest.mark.slow)]
)
def test_what_was_measured_is_written_where_it_cannot_be_printed(tiny_model, tmp_path, child_environment, closed):
    """The table was printed first, and took the page with it."""
    size = ["--frames", "9", "--height", "64", "--width", "64", "--steps", "1", "--device", "cpu"]
    chosen = ["--method", "svg", "--compare", "--no-warm-up", "--out", "clip.mp4"]
    command = [sys.executable, "-m", "vidaccel", "generate", "dot", "--model", str(tiny_model), *size, *chosen]
    if closed:
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full", os.O_WRONLY)
    done = subprocess.run(
        command, cwd=tmp_path, env=child_environment, stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    why = "Broken pipe" if closed else "No space left on device"
    said = f"Error: standard output takes no more ({why}). comparison: clip.report.html (open it in a browser); "
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    made = {"clip.mp4", "clip.dense.mp4", "clip.report.html", "clip.report.json"}
    assert made <= set(os.listdir(tmp_path))


@pytest.mark.parametrize("arguments", [["methods"], ["--version"]])
def test_a_full_disk_behind_a_table_is_one_line(child_environment, arguments):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "vidaccel", *arguments]
        done = subprocess.run(command, env=child_environment, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr == "Error: standard output takes no more (No space left on device).\n"


def test_what_was_measured_is_printed_where_it_cannot_be_written(capsys):
    with pytest.raises(RuntimeError, match="disk"), then_printed(lambda: print("table"), "page: w.html"):
        raise RuntimeError("disk")
    assert capsys.readouterr().out == "table\n"
    with then_printed(lambda: print("table"), "page: w.html"):
        print("written")
    assert capsys.readouterr().out == "written\ntable\npage: w.html\n"
