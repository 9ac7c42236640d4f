"""Ctrl-C and SIGTERM, wherever a run is: what is kept, what is said, and that a resumed run ends bit-equal."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from vidaccel.lora.checkpoints.checkpoint import CheckpointFolder
from vidaccel.lora.distributed.processes import Process, ProcessLost
from vidaccel.lora.launch import _encode
from vidaccel.lora.stopping import Stopped, StopRequested, StopSignals

SCRIPT = Path(__file__).with_name("stopped_processes.py")


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def once(monkeypatch, cls: type, method: str, at: int = 1, stop=terminate) -> None:
    """Let the process get a signal inside the call of this number, before its own work."""
    calls, original = [], getattr(cls, method)

    def called(self, *args):
        calls.append(method)
        if len(calls) == at:
            stop()
        return original(self, *args)

    monkeypatch.setattr(cls, method, called)


def checkpoints(settings) -> list[Path]:
    return CheckpointFolder(Path(settings.out) / "checkpoints").saved()


def equal(first, second) -> bool:
    return first.trained.keys() == second.trained.keys() and all(
        torch.equal(value, second.trained[name]) for name, value in first.trained.items()
    )


@pytest.mark.parametrize("at", [1, 5, 7])
def test_a_step_is_left_between_two_micro_batches(tiny_settings, run_tiny, monkeypatch, tiny_phase, at):
    """The state of the last whole step is saved, its random generators too, and the step is done again."""
    phases = {"first": {"steps": 2, "gradient_accumulation_steps": 4}, "second": {"steps": 1}}
    straight = run_tiny(tiny_settings("straight", phases=phases))
    settings = tiny_settings("stopped", phases=phases)
    once(monkeypatch, tiny_phase, "loss", at)
    words = "before the first step of phase first" if at == 1 else "stopped after step 1 of phase first"
    with pytest.raises(Stopped, match=words):
        run_tiny(settings)
    assert [path.name for path in checkpoints(settings)] == ([] if at == 1 else ["step_00000001"])
    resumed = run_tiny(settings, "auto")
    assert equal(straight, resumed)
    assert len(resumed.seen) == (4 * 2 + 1 if at == 1 else 4 + 1)


@pytest.mark.parametrize("method", ["clips", "setup"])
def test_a_stop_before_training_promises_nothing(tiny_settings, run_tiny, monkeypatch, tiny_phase, capfd, method):
    settings = tiny_settings(data={"cache": "some_cache"})
    once(monkeypatch, tiny_phase, method, stop=lambda: (terminate(), pytest.fail("it went on")))
    words = "while the phase first was prepared; what was encoded is kept in some_cache, and nothing was trained yet"
    with pytest.raises(Stopped, match=words):
        run_tiny(settings)
    said = capfd.readouterr().err
    assert "SIGTERM: the run ends.\n" in said and "checkpoint" not in said
    assert not checkpoints(settings)


def test_before_a_later_phase_the_last_checkpoint_is_named(tiny_settings, run_tiny, monkeypatch, tiny_phase):
    once(monkeypatch, tiny_phase, "clips", at=2)
    with pytest.raises(Stopped, match="the run stands at step_00000003: continue with --resume latest"):
        run_tiny(tiny_settings())


TWO_MICRO_BATCHES = {
    name: {"steps": 3, "batch_size": 1, "gradient_accumulation_steps": 2} for name in ("first", "second")
}


def resumed_from(settings, run_tiny, monkeypatch, checkpoint: Path, cls: type, method: str) -> tuple[str, str]:
    """Resume from a checkpoint, stop in a method before a step is done; the message, and the option that it names."""
    with monkeypatch.context() as patch, pytest.raises(Stopped) as caught:
        once(patch, cls, method)
        run_tiny(settings, str(checkpoint))
    option = str(caught.value).rpartition("--resume ")[2]
    assert option.endswith(".")
    (option,) = shlex.split(option[:-1])
    return str(caught.value), option


@pytest.mark.parametrize("method", ["prepare", "clips", "loss"])
def test_what_is_said_goes_on_from_the_checkpoint_that_was_chosen(
    tiny_settings, run_tiny, monkeypatch, tiny_recipe, tiny_phase, method
):
    """Not the last one of the folder, which is of a run that went further; and nothing of that run is lost."""
    loop = {"save_every": 1, "keep_last": 9, "validate_every": 1}
    settings = tiny_settings("with space", loop=loop, phases=TWO_MICRO_BATCHES)
    run_tiny(settings)
    log = (Path(settings.out) / "log.jsonl").read_text()
    assert len(checkpoints(settings)) == 6
    early = checkpoints(settings)[1]
    cls = tiny_recipe if method == "prepare" else tiny_phase
    said, option = resumed_from(settings, run_tiny, monkeypatch, early, cls, method)
    assert Path(option) == early, said
    assert (Path(settings.out) / "log.jsonl").read_text() == log
    again = run_tiny(settings, option)
    assert again.seen[0][:2] == ("first", 2)
    assert len(log.splitlines()) == len((Path(settings.out) / "log.jsonl").read_text().splitlines())


def test_a_checkpoint_of_another_folder_is_named_where_this_one_has_none(
    tiny_settings, run_tiny, monkeypatch, tiny_phase
):
    one, two = (tiny_settings(name, phases=TWO_MICRO_BATCHES) for name in ("one", "two"))
    run_tiny(one)
    there = checkpoints(one)[0]
    said, option = resumed_from(two, run_tiny, monkeypatch, there, tiny_phase, "loss")
    assert Path(option) == there, said
    assert not checkpoints(two)
    once(monkeypatch, tiny_phase, "loss", at=2)
    with pytest.raises(Stopped, match="after step 1 of phase second; continue with --resume latest"):
        run_tiny(two, option)


@pytest.mark.parametrize("resume", ["latest", "auto", "run/checkpoints/step_00000003"])
def test_before_a_checkpoint_is_looked_for_the_same_option_is_named(
    tiny_settings, run_tiny, monkeypatch, tiny_phase, resume
):
    run_tiny(tiny_settings())
    once(monkeypatch, CheckpointFolder, "clean")
    with pytest.raises(Stopped, match=f"before training began; start again with --resume {resume}"):
        run_tiny(tiny_settings(), resume)


def test_auto_with_nothing_to_resume_promises_nothing(tiny_settings, run_tiny, monkeypatch, tiny_phase):
    once(monkeypatch, tiny_phase, "clips")
    with pytest.raises(Stopped, match="was prepared; nothing was trained yet: start again without --resume"):
        run_tiny(tiny_settings(), "auto")


def test_what_keeps_no_encodings_promises_none(tiny_settings, run_tiny, monkeypatch, tiny_recipe, tiny_phase):
    settings = tiny_settings(data={"cache": "some_cache"})
    monkeypatch.setattr(tiny_recipe, "encodings", None)
    once(monkeypatch, tiny_phase, "clips")
    with pytest.raises(Stopped, match="while the phase first was prepared; nothing was trained yet"):
        run_tiny(settings)
    monkeypatch.setattr(tiny_recipe, "encode", lambda self: terminate())
    with pytest.raises(Stopped, match=r"stopped while clips were encoded\.$"):
        _encode(tiny_recipe(settings, Process(torch.device("cpu"))))


def test_a_stop_while_models_are_loaded(tiny_settings, run_tiny, monkeypatch, tiny_recipe):
    once(monkeypatch, tiny_recipe, "prepare")
    with pytest.raises(Stopped, match="stopped before training began; nothing was trained yet: start again"):
        run_tiny(tiny_settings())


def test_a_stop_while_caches_are_filled_beforehand(tiny_settings, monkeypatch, tiny_recipe):
    """`--encode-only` has no run to go on with."""
    monkeypatch.setattr(tiny_recipe, "encode", lambda self: (terminate(), pytest.fail("it went on")))
    settings = tiny_settings(data={"cache": "some_cache"})
    with pytest.raises(Stopped, match=r"stopped while clips were encoded; what was encoded is kept in some_cache\.$"):
        _encode(tiny_recipe(settings, Process(torch.device("cpu"))))


@pytest.mark.parametrize(("at", "step"), [(1, 2), (2, 3)])
def test_a_validation_is_left_and_made_again(tiny_settings, run_tiny, monkeypatch, tiny_phase, at, step):
    """Between steps, and at the end of a phase, which then goes on to the next one when it is resumed."""

    def validate(self, model, folder, number, original=tiny_phase.validate):
        calls.append(number)
        if len(calls) == at:
            terminate()
        self.recipe.process.check_stop()
        return original(self, model, folder, number)

    calls: list[int] = []
    loop = {"validate_every": 2}
    straight = run_tiny(tiny_settings("straight", loop=loop))
    monkeypatch.setattr(tiny_phase, "validate", validate)
    settings = tiny_settings("stopped", loop=loop)
    with pytest.raises(Stopped, match=f"stopped after step {step} of phase first; continue with --resume latest"):
        run_tiny(settings)
    assert [path.name for path in checkpoints(settings)][-1] == f"step_{step:08d}"
    assert equal(straight, run_tiny(settings, "latest"))
    logs = [(Path(s.out) / "log.jsonl").read_text().splitlines() for s in (tiny_settings("straight"), settings)]
    rows = [[{k: v for k, v in json.loads(line).items() if k != "seconds_per_step"} for line in log] for log in logs]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("ends", ["stopped", "killed"])
def test_a_validation_that_was_made_again_is_in_the_log_once(tiny_settings, run_tiny, monkeypatch, tiny_phase, ends):
    """Whether the run is stopped behind it, or killed before the next checkpoint: the last one says that it is done."""

    def validate(self, model, folder, number, original=tiny_phase.validate):
        calls.append(number)
        if len(calls) == 1:
            terminate()
            self.recipe.process.check_stop()
        if len(calls) == 2 and ends == "stopped":
            terminate()
        return original(self, model, folder, number)

    calls: list[int] = []
    monkeypatch.setattr(tiny_phase, "validate", validate)
    settings = tiny_settings(loop={"validate_every": 2})
    with pytest.raises(Stopped):
        run_tiny(settings)
    with monkeypatch.context() as patch:
        patch.setattr(tiny_phase, "loss", lambda *_: (_ for _ in ()).throw(MemoryError("killed")))
        with pytest.raises(Stopped if ends == "stopped" else MemoryError):
            run_tiny(settings, "latest")
    run_tiny(settings, "latest")
    rows = [json.loads(line) for line in (Path(settings.out) / "log.jsonl").read_text().splitlines()]
    assert [row["total_steps"] for row in rows if "validation_bias" in row] == [2, 3, 5, 6]
    assert [row["total_steps"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert calls == [2, 2, 3, 5, 6]


def test_a_validation_that_fails_costs_no_step(tiny_settings, run_tiny, monkeypatch, tiny_phase):
    """Such as one that needs more memory than there is: the steps before it are in a checkpoint."""
    settings = tiny_settings(loop={"validate_every": 2, "save_every": 2})
    with monkeypatch.context() as patch:
        patch.setattr(tiny_phase, "validate", lambda *_: (_ for _ in ()).throw(MemoryError("out of memory")))
        for resume in (None, "latest"):
            with pytest.raises(MemoryError):
                run_tiny(settings, resume)
            assert [path.name for path in checkpoints(settings)] == ["step_00000002"]
    run_tiny(settings, "latest")
    rows = [json.loads(line) for line in (Path(settings.out) / "log.jsonl").read_text().splitlines()]
    assert [row["total_steps"] for row in rows if "validation_bias" in row] == [2, 3, 5, 6]


def test_a_stop_while_the_result_is_written(tiny_settings, run_tiny, monkeypatch, tiny_recipe):
    straight = run_tiny(tiny_settings("straight"))
    once(monkeypatch, tiny_recipe, "finish", stop=lambda: (terminate(), pytest.fail("it went on")))
    with pytest.raises(Stopped, match="while the result was written; the run stands at step_00000006: continue"):
        run_tiny(tiny_settings("stopped"))
    monkeypatch.undo()
    resumed = run_tiny(tiny_settings("stopped"), "latest")
    assert equal(straight, resumed) and not resumed.seen


def test_a_process_that_is_gone_is_told_with_how_to_go_on(tiny_settings, run_tiny, monkeypatch, tiny_phase):
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")
    device = torch.device("cpu")
    assert not Process(device).is_lost(lost) and Process(device, count=2).is_lost(lost)
    backend = torch.distributed.DistBackendError("Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000")
    for own in (RuntimeError("shapes do not match"), RuntimeError("[gloo] Timed out waiting 43200000ms"), backend):
        assert not Process(device, count=2).is_lost(own)

    def fail():
        raise lost

    once(monkeypatch, tiny_phase, "loss", stop=fail)
    monkeypatch.setattr(Process, "is_lost", lambda self, error: error is lost)
    with pytest.raises(
        ProcessLost, match="another process of the run has ended, .*Connection closed by peer.*; .*resume"
    ):
        run_tiny(tiny_settings("lost"))


def test_a_second_signal_ends_at_once(monkeypatch):
    signals = StopSignals()
    with signals.listening():
        terminate()
        assert signals.requested
        with pytest.raises(KeyboardInterrupt):
            terminate()
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
        terminate()  # one that the launcher has passed on again


def test_slurms_warning_is_a_stop(tiny_settings, run_tiny, monkeypatch, tiny_phase):
    """`--signal=USR1@120`: by default it ends a process without a word, and without a checkpoint."""
    straight = run_tiny(tiny_settings("straight"))
    once(monkeypatch, tiny_phase, "loss", 3, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    with pytest.raises(Stopped, match="stopped after step 3 of phase first; continue with --resume latest"):
        run_tiny(tiny_settings("stopped"))
    assert equal(straight, run_tiny(tiny_settings("stopped"), "latest"))
    signals = StopSignals()
    with signals.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)  # to the step, and by way of the script
        terminate()  # follows at the end of the job: the same request
        assert signals.requested
        with pytest.raises(KeyboardInterrupt):
            terminate()


def test_a_signal_before_a_block_ends_it_too():
    signals = StopSignals()
    with signals.listening():
        terminate()
        with pytest.raises(StopRequested), signals.at_once():
            pytest.fail("it began")
    process = Process(torch.device("cpu"), stop=signals)
    with pytest.raises(StopRequested):
        process.check_stop()


CLOSED = """
import signal, sys, time
from pathlib import Path
from vidaccel.lora.stopping import StopSignals
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signals = StopSignals()
with signals.listening():
    print("ready", flush=True)
    for _ in range(500):
        if signals.requested:
            break
        time.sleep(0.02)
    print("saved", flush=True)
    print("saved", file=sys.stderr, flush=True)
    Path("saved").write_text(str(signals.requested))
"""


@pytest.mark.parametrize("tail", ["", " 2>&1 | tee log"])
def test_where_a_terminal_is_closed_the_work_is_saved(tmp_path, tail):
    """What is written to what is gone fails, and so did the run before its checkpoint: to the terminal, or a pipe to
    what has ended with it."""
    master, terminal = os.openpty()
    (tmp_path / "vidaccel").symlink_to(Path(__file__).parents[2], target_is_directory=True)
    (tmp_path / "run.py").write_text(CLOSED)
    # The shell ends, so what it started has to be waited for by its file.
    command = ["sh", "-c", f"{shlex.quote(sys.executable)} run.py{tail}"]
    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}

    def at_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    child = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, preexec_fn=at_terminal, **streams)
    os.close(terminal)
    assert b"ready" in os.read(master, 100)
    os.close(master)
    child.wait(timeout=120)
    end = time.monotonic() + 60
    while not (tmp_path / "saved").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert (tmp_path / "saved").read_text() == "True"


def test_nohup_stays():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals = StopSignals()
        with signals.listening():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def launch(tmp_path):
    """Start the script with two processes; returns the launcher, whose output is read line by line."""
    started: list[subprocess.Popen] = []

    def start(mode: str) -> subprocess.Popen:
        folder = tmp_path / "path"
        folder.mkdir()
        (folder / "vidaccel").symlink_to(Path(__file__).parents[2], target_is_directory=True)
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
        command += ["--dynamo_backend", "no", "--mixed_precision", "no", "--num_processes", "2"]
        # Not 0, which older versions do not take for "any".
        command += ["--main_process_port", str(get_free_port()), str(SCRIPT), mode, str(tmp_path / "run")]
        paths = os.pathsep.join([str(folder), str(Path(__file__).parents[2] / "tests" / "lora")])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env=environment, cwd=tmp_path, start_new_session=True, **pipe))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.stdout.close()


def read_until(process: subprocess.Popen, *words: str) -> str:
    """The output up to a point where every one of the words was in it."""
    text = ""
    while not all(word in text for word in words):
        line = process.stdout.readline()
        assert line, f"ended before {words}:\n{text}"
        text += line
    return text


@pytest.mark.parametrize("mode", ["train", pytest.param("validate", marks=pytest.mark.slow)])
def test_two_processes_leave_what_takes_long_together(launch, tmp_path, mode):
    """What no one would wait for: the launcher passes Ctrl-C on, and kills after 30 s."""
    launcher = launch(mode)
    read_until(launcher, "process 0 takes long", "process 1 takes long")
    launcher.send_signal(signal.SIGINT)
    said, _ = launcher.communicate(timeout=1800)
    assert said.count("stopped after step 1 of phase first; continue with --resume latest.") == 2, said
    assert said.count("the run ends after this micro-batch, and what was trained is saved") == 2
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints")
    saved = folder.load(folder.find("latest"))
    assert saved.step == 1 and len(saved.random) == 2
    assert "SIGKILL" not in said, said


def test_two_processes_end_while_one_encodes_and_the_other_waits(launch, tmp_path):
    launcher = launch("encode")
    read_until(launcher, "process 0 encodes", "process 1 waits")
    launcher.terminate()
    said, _ = launcher.communicate(timeout=1800)
    assert said.count("stopped while the phase first was prepared; nothing was trained yet") == 2, said
    assert "SIGKILL" not in said and "checkpoint" not in said, said
    assert not (tmp_path / "run" / "checkpoints").exists()
