"""What a run says and keeps of its numbers."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from vidaccel.lora.logs import tracking
from vidaccel.lora.logs.pictures import write_picture, write_video
from vidaccel.lora.logs.progress import Progress, duration, each
from vidaccel.lora.logs.tracking import Tracker
from vidaccel.lora.phase_run import PhaseRun
from vidaccel.lora.stopping import Stopped


def log(settings) -> list[dict]:
    return [json.loads(line) for line in (Path(settings.out) / "log.jsonl").read_text().splitlines()]


def test_small_numbers_keep_their_digits(tiny_settings, run_tiny):
    phases = {"first": {"steps": 2, "learning_rate": 5e-5, "lr_warmup_steps": 1000}, "second": {"steps": 0}}
    settings = tiny_settings(phases=phases)
    run_tiny(settings)
    rates = [row["learning_rate"] for row in log(settings) if "learning_rate" in row]
    assert rates == [5e-8, 1e-7]


def test_the_log_is_json_where_a_number_is_infinite(tiny_settings, run_tiny, monkeypatch):
    """A gradient that overflows in float16 has an infinite norm, and `Infinity` is no JSON."""
    step = PhaseRun._one_step
    monkeypatch.setattr(
        PhaseRun, "_one_step", lambda *given: {**step(*given), "gradient_norm": torch.tensor(float("inf"))}
    )
    settings = tiny_settings(phases={"second": {"steps": 0}})
    run_tiny(settings)
    lines = (Path(settings.out) / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines]
    assert rows[0]["gradient_norm"] is None and rows[0]["loss"] > 0


def test_the_log_has_each_step_once(tiny_settings, run_tiny, stop_after):
    """Also where a run was killed: then the log goes beyond the checkpoint, and its last line may be torn."""
    settings = tiny_settings(loop={"validate_every": 2})
    stop_after(5)
    with pytest.raises(Stopped):
        run_tiny(settings)
    file = Path(settings.out) / "log.jsonl"
    later = {"phase": "second", "step": 3, "total_steps": 6, "loss": 0.0}
    file.write_text(file.read_text() + json.dumps(later) + '\n{"phase": "second", "st')
    run_tiny(settings, "latest")
    steps = [(row["phase"], row["step"]) for row in log(settings) if "loss" in row]
    assert steps == [(phase, step) for phase in ("first", "second") for step in (1, 2, 3)]
    assert [row["total_steps"] for row in log(settings) if "validation_bias" in row] == [2, 3, 5, 6]


def test_the_log_is_of_the_run_that_the_checkpoint_is_of(tiny_settings, run_tiny, stop_after):
    """Also where the resumed run wrote no number before it was stopped."""
    loop = {"save_every": 1, "keep_last": 9}
    run_tiny(tiny_settings(loop=loop))
    settings = tiny_settings(loop={**loop, "log_every": 100})
    stop_after(1)
    with pytest.raises(Stopped, match="after step 2 of phase first; continue with --resume latest"):
        run_tiny(settings, f"{settings.out}/checkpoints/step_00000001")
    assert [row["total_steps"] for row in log(settings)] == [1]


def test_what_runs_is_said_at_the_start(tiny_settings, run_tiny, capsys):
    phases = {"first": {"steps": 2, "batch_size": 3, "gradient_accumulation_steps": 2}, "second": {"steps": 0}}
    run_tiny(tiny_settings(phases=phases))
    said = capsys.readouterr().out
    assert "1 process on cpu, mixed_precision no.\n" in said
    assert "phase first: 2 steps, 6 clips a step (2 micro-batches x 1 process), 40 trained parameters.\n" in said
    assert " first 1/2  " in said and "s left\n" in said


@pytest.mark.parametrize(("rank", "warned"), [(None, True), ("0", False)])
def test_one_process_where_several_were_asked_for(tiny_settings, run_tiny, monkeypatch, caplog, rank, warned):
    """As `accelerate launch --num_processes 2` starts on a machine without GPUs."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    run_tiny(tiny_settings())
    assert ("told of several processes, but started one" in caplog.text) is warned


def test_accelerate_says_so_where_it_starts_one_process_of_two():
    """What the warning above reads from the environment is what this version of accelerate sets."""
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    given = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "a.py"]
    arguments = launch_command_parser().parse_args(given)
    arguments.use_cpu = False
    _, environment = prepare_simple_launcher_cmd_env(arguments)
    assert {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= environment.keys()
    arguments.num_processes = 1
    _, environment = prepare_simple_launcher_cmd_env(arguments)
    assert "MASTER_ADDR" not in environment or "MASTER_ADDR" in os.environ


def test_progress_in_a_file_is_a_line_now_and_then(capsys):
    progress = Progress(Console(file=io.StringIO()), seconds=0)
    with progress.task("encoding clips", 2) as advance:
        advance()
        advance()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("encoding clips: 1 of 2, ") and first.endswith(" left")
    assert second.startswith("encoding clips: 2 of 2, ") and second.endswith("0 s left")
    with Progress(Console(file=io.StringIO()), seconds=3600).task("encoding clips", 2) as advance:
        advance()
    assert capsys.readouterr().out == ""


def test_progress_on_a_terminal_is_a_bar_below_the_lines(capsys):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    progress = Progress(console)
    with progress.task("phase lora", 10, done=5, lines=False) as advance:
        with progress.task("validation videos", 3) as inner:
            inner()
            progress.say("a line [0, 1] of a:warning:b")
            progress._bars.refresh()
        advance()
        progress._bars.refresh()
    shown = console.file.getvalue()
    assert "a line [0, 1] of a:warning:b" in shown and "1/3" in shown and "6/10" in shown
    assert capsys.readouterr().out == ""
    progress.say("without a bar")
    assert capsys.readouterr().out == "without a bar\n"


def test_times_in_words():
    assert [duration(s) for s in (3.4, 99, 600, 12_000)] == ["3 s", "99 s", "10 min", "3 h 20 min"]
    assert [each(s) for s in (2.5, 0.125)] == ["2.5 s each", "8 a second"]


def test_the_validation_before_the_first_step_is_in_the_log_once(tiny_settings, tmp_path):
    """A phase that begins anew makes it again."""
    accelerator = SimpleNamespace(log_with=[], is_main_process=True, trackers=[])
    settings = tiny_settings("my_run", loop={"validate_first": True})
    (tmp_path / "my_run").mkdir()
    for _ in range(2):
        Tracker(accelerator, settings, Progress()).write_validation("first", 0, 0, {"error": 0.5}, 3)
    assert len((tmp_path / "my_run" / "log.jsonl").read_text().splitlines()) == 1


def test_a_resumed_run_is_one_run_of_wandb(tiny_settings, tmp_path, monkeypatch):
    """It began another each time, in a project called after the recipe, with numbers alone."""
    begun, logged = [], []
    run = SimpleNamespace(log=lambda values, step: logged.append((values, step)))

    def init_trackers(project, config, more):
        begun.append((project, more))

    accelerator = SimpleNamespace(
        log_with=[SimpleNamespace(value="wandb")],
        is_main_process=True,
        trackers=[SimpleNamespace(name="wandb", run=run)],
        init_trackers=init_trackers,
    )
    fake = SimpleNamespace(Image=lambda path: ("image", path), Video=lambda path, format: ("video", path, format))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    random.seed(1)
    before = random.getstate()
    log = tmp_path / "my_run" / "log.jsonl"
    for project, done in ((None, 0), ("films", 2)):
        settings = tiny_settings("my_run", loop={"tracker_project": project})
        tracker = Tracker(accelerator, settings, Progress(), done)
        log.write_text('{"phase": "first", "step": 2, "total_steps": 2, "loss": 1}\n')
    [(first, one), (second, two)] = begun
    assert (first, second) == ("tiny", "films") and one == two and random.getstate() == before
    number = (tmp_path / "my_run" / "tracker" / "wandb_id.txt").read_text().strip()
    place = str(tmp_path / "my_run" / "tracker")
    assert one == {"wandb": {"name": "my_run", "id": number, "resume": "allow", "dir": place}} and len(number) == 16
    # wandb drops steps that come again: they are in a run of their own.
    Tracker(accelerator, settings, Progress(), 1)
    again = begun.pop()[1]["wandb"]
    assert again["name"] == "my_run" and again["id"] != number
    for name in ("00000003.png", "00000003_0.mp4", "00000003.txt", "00000009.png"):
        (tmp_path / name).write_text("")
    tracker.show("first", 3, tmp_path)
    assert logged == [
        ({"first/validation/frames": ("image", str(tmp_path / "00000003.png"))}, 3),
        ({"first/validation/0": ("video", str(tmp_path / "00000003_0.mp4"), "mp4")}, 3),
    ]


def test_tensorboard_has_the_pictures_and_each_step_once(tiny_settings, run_tiny, monkeypatch, tiny_phase):
    pytest.importorskip("tensorboard")
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def validate(self, model, folder, step):
        folder.mkdir(parents=True, exist_ok=True)
        write_picture(np.zeros((16, 24, 3), np.uint8), folder / f"{step:08d}.png")
        write_video(torch.linspace(-1, 1, 5).view(1, 5, 1, 1).expand(3, 5, 16, 24), folder / f"{step:08d}_0.mp4")
        return {"bias": 0.5}

    monkeypatch.setattr(tiny_phase, "validate", validate)
    loop = {"tracker": "tensorboard", "save_every": 2}
    settings = tiny_settings(loop=loop, phases={"first": {"steps": 3}, "second": {"steps": 0}})
    run_tiny(settings)
    run_tiny(settings, f"{settings.out}/checkpoints/step_00000002")
    (folder,) = {
        file.parent for file in (Path(settings.out) / "tracker").rglob("*tfevents*") if "tiny" in file.parent.name
    }
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("first/loss")] == [1, 2, 3]
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(tiny_phase, "loss", lambda *_: (_ for _ in ()).throw(MemoryError("killed")))
        run_tiny(settings, f"{settings.out}/checkpoints/step_00000002")  # which never trains
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("first/loss")] == [1, 2, 3]
    (picture,), (video,) = (events.Images(f"first/validation/{name}") for name in ("frames", "0"))
    assert (picture.step, picture.width, picture.height) == (3, 24, 16)
    gif = Image.open(io.BytesIO(video.encoded_image_string))
    assert (gif.format, gif.size, gif.n_frames, gif.info["duration"]) == ("GIF", (24, 16), 5, 60)


def test_a_row_that_a_full_disk_cuts_leaves_nothing(tmp_path):
    path = tmp_path / "log.jsonl"
    tracking._append("1\n", path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, before[0][1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            tracking._append("23456789\n", path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        signal.signal(signal.SIGXFSZ, before[1])
    tracking._append("3\n", path)
    assert path.read_text() == "1\n3\n"


@pytest.mark.parametrize("rows", [b"\xff\xfe\0\n", b"[" * 100_000 + b"\n"])
def test_rows_of_a_log_that_are_none_are_left_out(tiny_settings, run_tiny, stop_after, rows):
    settings = tiny_settings()
    stop_after(2)
    with pytest.raises(Stopped):
        run_tiny(settings)
    file = Path(settings.out) / "log.jsonl"
    file.write_bytes(rows + file.read_bytes())
    run_tiny(settings, "latest")
    assert [row["total_steps"] for row in log(settings) if "loss" in row] == list(range(1, 7))
