"""`vidaccel generate` in several processes of a CPU: the same video, one voice, and no process left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from torch.distributed.elastic.utils.distributed import get_free_port

from vidaccel.generation.media.video_reader import read_video

SMALL = ("--frames", 9, "--height", 64, "--width", 64, "--device", "cpu", "--seed", 3)
PROMPT = "a dot"


def workers_of(process: int) -> list[int]:
    """The processes that one has started, without the one that keeps count of its semaphores."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


@pytest.fixture
def start(tiny_model, tmp_path, child_environment):
    """`start(*options)`, in a group of processes of its own."""

    def start(*options) -> subprocess.Popen:
        arguments = ["generate", PROMPT, "--model", tiny_model, *SMALL, *options]
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "vidaccel.cli", *map(str, arguments)],
            env=child_environment, cwd=tmp_path, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--method", "dense"), "2 processes share guidance by two; transformer: 3 passes computed here, 3 by"),
        pytest.param(
            ("--method", "radial", "--share", "sequence", "--dense-steps", 0, "--density", 0.7, "--backend", "gather"),
            "2 processes share each sequence by 2.",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_video_is_that_of_one_process(options, told, start, vidaccel, tiny_model, tmp_path):
    process = start(*options, "--steps", 3, "--processes", 2, "--out", "two.mp4")
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert told in output and output.count("two.mp4") == 1
    alone = [option for option in options if option not in ("--share", "sequence")]
    made = vidaccel(
        "generate", PROMPT, "--model", tiny_model, *SMALL, *alone, "--steps", 3, "--out", tmp_path / "1.mp4"
    )
    assert made.exit_code == 0, made.output
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_file()) == ["1.mp4", "two.mp4"]
    one, two = (read_video(tmp_path / name)[0].astype(float) for name in ("1.mp4", "two.mp4"))
    assert np.abs(one - two).max() <= (0 if "dense" in options else 4)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs the list of processes of Linux")
@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        (None, 1),
    ],
)
def test_an_end_before_time_leaves_no_process_and_no_file(number, code, start, tmp_path):
    """Ctrl-C goes to all processes, SIGTERM to the one that was started; and one of them may be killed."""
    process = start("--steps", 900, "--processes", 2, "--out", "two.mp4")
    try:
        assert process.stdout.readline().startswith("method dense: the video has 48 tokens")
        time.sleep(2)  # the weights of this model are read within it
        workers = workers_of(process.pid)
        assert len(workers) == 2
        if number is None:
            os.kill(workers[-1], signal.SIGKILL)
        elif number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    told = "Error: process 1 of 2 was ended by SIGKILL" if number is None else "Interrupted: what was at work"
    assert len(re.findall(told, errors)) == 1
    assert not [worker for worker in workers if os.path.exists(f"/proc/{worker}")]
    assert not [file for file in tmp_path.iterdir() if file.is_file()]


def test_a_process_whose_others_do_not_come_can_be_ended(start, child_environment, tmp_path):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    child_environment |= dict(zip(names, "1122", strict=True))
    child_environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
    process = start("--steps", 1, "--method", "dense", "--out", "one.mp4", "--threads", "1")
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=20)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 143, errors
    assert errors.strip().splitlines()[-1].startswith("Interrupted:")
    assert "Traceback" not in errors and not [file for file in tmp_path.iterdir() if file.is_file()]
