"""Ctrl-C, and the signals that end a process: one line, an exit code of its own, and nothing left behind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import typer

from vidaccel.cli.errors import one_line_errors

SMALL = ("--frames", 9, "--height", 64, "--width", 64, "--steps", 2, "--device", "cpu")


@pytest.fixture(autouse=True)
def hangups_count():
    """Where the tests are run under nohup, too, which would be left as it is here, and to the processes started."""
    if not hasattr(signal, "SIGHUP"):
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_interrupted(number, code, tiny_model, tmp_path, child_environment):
    """Ctrl-C in the middle of denoising: its own exit code, one line, and nothing under the final name."""
    folder = tmp_path / "out"
    folder.mkdir()
    code_to_run = """
import sys
from vidaccel.generation import run as generation
from vidaccel.cli import main
original = generation.make_video
def make_video(pipe, settings, name, *args, on_step, **kwargs):
    def told(done, total, latents):
        on_step(done, total, latents)
        print(f"step {done} of {name}", flush=True)
    return original(pipe, settings, name, *args, on_step=told, **kwargs)
generation.make_video = make_video
main()
"""
    size = ("--frames", 9, "--height", 64, "--width", 64, "--device", "cpu", "--threads", 1)
    options = ("--model", tiny_model, "--method", "random", "--method", "dense", "--backend", "gather", *size)
    arguments = ["generate", "a dot", *options, "--steps", 900, "--out", folder / "out.mp4"]
    process = subprocess.Popen(
        [sys.executable, "-c", code_to_run, *map(str, arguments)],
        env=child_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        for line in process.stdout:
            if line.startswith("step 3 of"):
                process.send_signal(number)
                break
        _, errors = process.communicate()
    finally:
        process.kill()
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("Interrupted:")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_within_a_run(vidaccel, tiny_model, tmp_path, monkeypatch, name):
    """As `test_interrupted` has it, in this process."""
    if (number := getattr(signal, name, None)) is None:
        pytest.skip(f"there is no {name} here")
    before = signal.getsignal(number)
    from vidaccel.generation import run as generation

    original = generation.make_video

    def make_video(*args, on_step, **more):
        return original(*args, on_step=lambda *_: os.kill(os.getpid(), number), **more)

    monkeypatch.setattr(generation, "make_video", make_video)
    options = ("--method", "dense", *SMALL, "--out", tmp_path / "out.mp4")
    result = vidaccel("generate", "a dot", "--model", tiny_model, *options)
    assert result.exit_code == 128 + number
    assert result.stderr.endswith("Interrupted: what was at work was not written.\n")
    assert list(tmp_path.iterdir()) == [] and signal.getsignal(number) is before


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_progress_bar_on_a_closed_terminal_changes_no_code(name):
    """It is ended on the way out, which raises an error in place of what the signal raised."""
    if (number := getattr(signal, name, None)) is None:
        pytest.skip(f"there is no {name} here")
    with pytest.raises(typer.Exit) as stop, one_line_errors():
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert stop.value.exit_code == 128 + number


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP here")
def test_a_hangup_that_is_ignored_ends_nothing():
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with one_line_errors():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_hangup_ends_the_encoder(tmp_path, child_environment):
    """Both were left behind: the encoder at work, and its temporary file."""
    code = """
import numpy as np
from vidaccel.cli.errors import one_line_errors
from vidaccel.generation.media.video import write_mp4
with one_line_errors():
    write_mp4(np.random.default_rng(0).integers(0, 256, (400, 480, 640, 3), np.uint8), "clip.mp4")
"""
    process = subprocess.Popen([sys.executable, "-c", code], env=child_environment, cwd=tmp_path)
    while process.poll() is None and not list(tmp_path.glob(".clip.mp4.*")):
        time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    process.wait()
    assert process.returncode and list(tmp_path.glob("*clip*")) == list(tmp_path.glob(".clip*")) == []
