"""`vidaccel methods` and `vidaccel info`, and how quickly the command answers."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch

from vidaccel.attention import METHODS
from vidaccel.attention.backends import BACKENDS
from vidaccel.generation.levers.methods import MIN_SPARSE_TOKENS
from vidaccel.pipelines.acceleration.families import NOT_SERVED
from vidaccel.pipelines.acceleration.support import support_rows


def _words(text: str) -> str:
    """Without line breaks: tables wrap their cells."""
    return " ".join(text.split())


def test_families_are_named_whole_in_a_narrow_terminal(vidaccel, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = vidaccel("methods", "--families")
    assert result.exit_code == 0, result.output
    shown = "".join(result.stdout.split())
    for row in support_rows():
        for text in row.values():
            assert "".join(text.split()) in shown, text
        for name in row["diffusers pipelines"].split(", "):
            assert name in result.stdout, name
    assert "…" not in shown
    assert all(name in shown for name in NOT_SERVED)


def test_methods_says_everything_about_each(vidaccel, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    result = vidaccel("methods")
    assert result.exit_code == 0, result.output
    shown = _words(result.stdout)
    assert "dense" in shown
    for name, method in METHODS.items():
        for text in (name, method.summary, method.good_for, method.costs, method.source):
            assert _words(text) in shown
    assert "top_p=0.9" in shown
    assert "first_steps=" in shown
    rows = [_words(line) for line in result.stdout.splitlines()]
    taken = [row for row in rows if row.startswith("by default")]
    assert taken == [
        "by default for a video of fewer than 8192 tokens",
        "by default for a video of at least 8192 tokens",
    ]
    starts = {name: next(i for i, row in enumerate(rows) if row.startswith(f"{name} does")) for name in METHODS}
    assert starts["tangent"] < rows.index(taken[1]) < starts["sparge"]


def test_info_says_what_can_run_here(vidaccel, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    result = vidaccel("info")
    assert result.exit_code == 0, result.output
    shown = _words(result.stdout)
    assert torch.__version__.split("+")[0] in shown
    for name, backend in BACKENDS.items():
        assert f"{name} {backend.unavailable(torch.device('cpu')) or 'yes'}" in shown


def test_why_a_backend_cannot_run(vidaccel, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(BACKENDS["gather"], "unavailable", lambda device: "needs a Tuesday")
    assert "needs a Tuesday" in _words(vidaccel("info").stdout)
    result = vidaccel("generate", "a dot", "--method", "svg2", "--backend", "gather", "--device", "cpu")
    assert result.exit_code == 2
    assert "--backend is gather: it cannot be used here: it needs a Tuesday" in result.stderr


def test_help_imports_nothing_heavy(child_environment, tmp_path):
    """`vidaccel --help` answers at once: it loads no torch, no numpy."""
    code = """
import sys
from typer.testing import CliRunner
from vidaccel.cli import app
for arguments in (["--help"], ["generate", "--help"]):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
print([name for name in ("torch", "numpy", "diffusers", "matplotlib") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=child_environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_a_plan_says_what_a_video_takes(vidaccel):
    text = _words(vidaccel("info", "--forecast", "--frames", "33", "--height", "128", "--width", "128").stdout)
    assert "576 (9 x 8 x 8)" in text and "331,776" in text and "transformer 7.8 MB" in text
    assert "tangent" not in text  # so short a video is dense without --method


def test_a_plan_counts_what_the_default_method_holds(vidaccel):
    """3 heads of 64 channels, 66 x 165 pairs of clusters, bfloat16; a bias each, a matrix and a centre a tile."""
    text = _words(vidaccel("info", "--forecast", "--frames", "129", "--height", "256", "--width", "256").stdout)
    assert "8,448 (33 x 16 x 16)" in text
    tables = 3 * 66 * (165 * (2 * 64 * 2 + 4) + 64 * 64 * 2 + 64 * 4)
    assert f"tables of a tangent call {tables / 1e6:.1f} MB" in text
    kept = 3 * (2 * 2 * 8448 + 4 * (66 + 165) * 64)  # labels of queries and keys, and the means of their clusters
    assert f"kept during a run {kept / 1e6:.1f} MB for each layer and guidance branch" in text


def test_a_plan_for_2160p_shows_the_canvas_and_what_tiles_save(vidaccel):
    arguments = ("--model", "demo-dc", "--frames", "81", "--height", "2160", "--width", "3840")
    text = _words(vidaccel("info", "--forecast", *arguments).stdout)
    assert "84 frames of 3840x2176, cropped" in text and "171,360 (21 x 68 x 120)" in text
    whole, tiled = (float(part.split()[0]) for part in text.split("about ")[2:4])
    # The built-in autoencoder is small: the video itself is most of both.
    assert whole > 1.2 * tiled


def test_a_plan_for_an_adapter_counts_its_base(vidaccel, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    text = _words(vidaccel("info", "--forecast", "--model", "demo-dc").stdout)
    assert "transformer of the base 7.8 MB" in text and "vae of the base" not in text


def test_options_of_a_plan_need_it(vidaccel):
    result = vidaccel("info", "--frames", "3", "--dtype", "nope")
    assert result.exit_code == 2
    assert result.stderr == "Error: --frames, --dtype are of use only together with --forecast. Leave them out.\n"
    result = vidaccel("info", "--model", "demo")
    assert result.exit_code == 2 and "--model is of use only together with --forecast. Leave it out." in result.stderr


def test_the_version(vidaccel):
    from vidaccel import __version__

    assert vidaccel("--version").stdout == f"vidaccel {__version__}\n"


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", "??"), ("cp1252", "–?"), ("utf-8", "–日")])
def test_what_an_output_cannot_show_ends_no_run(monkeypatch, encoding, shown):
    from vidaccel import cli

    out = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(cli, "app", lambda **_: print("–日", flush=True))
    monkeypatch.setattr("sys.stdout", out)
    cli.main()
    assert out.buffer.getvalue().decode(encoding).strip() == shown
    for other in (None, io.StringIO()):  # of a program without a console, of a test
        monkeypatch.setattr("sys.stdout", other)
        cli.main()


def test_names_of_files_go_out_as_they_came_in(monkeypatch):
    """In the locale C, Python passes bytes of other encodings through."""
    from vidaccel import cli

    out = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="surrogateescape")
    monkeypatch.setattr(cli, "app", lambda **_: print("caf\udce9", flush=True))
    monkeypatch.setattr("sys.stdout", out)
    cli.main()
    assert out.buffer.getvalue().strip() == b"caf\xe9"


def test_the_order_of_the_commands(vidaccel, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = _words(vidaccel("--help").stdout)
    begins = ["Make a video from", "What each method does", "Versions, devices", "Train a LoRA", "Convert published"]
    places = [shown.index(words) for words in begins]
    assert places == sorted(places)


def test_the_help_of_generate_names_every_method(vidaccel, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    shown = _words(vidaccel("generate", "--help").stdout)
    assert ", ".join(["dense", *sorted(METHODS)]) in shown
    assert f"tangent for a video of at least {MIN_SPARSE_TOKENS} tokens, otherwise dense" in shown


def test_threads_are_counted_in_words(monkeypatch):
    from vidaccel.generation.machine import environment

    for threads, words in ((1, "torch uses 1 thread"), (2, "torch uses 2 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert environment(torch.device("cpu"))["CPU"].endswith(words)


@pytest.mark.parametrize("option", ["max_sequence_length=abc", "max_sequence_length=0", "num_videos_per_prompt=2"])
def test_options_of_the_pipeline_that_a_plan_refuses(vidaccel, option):
    result = vidaccel("info", "--forecast", "--pipeline-option", option)
    assert result.exit_code == 2 and result.stderr.startswith("Error: --pipeline-option is "), result.exception


def test_a_plan_of_what_cannot_be_made(vidaccel):
    result = vidaccel("info", "--forecast", "--frames", "10")
    assert result.exit_code == 2 and "4k+1 frames" in result.stderr
