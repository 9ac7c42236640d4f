"""`benchmarks/first_gpu_run.py`: whose turn it is, what is kept, and that its steps can be run. No GPU is needed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import accumulate

import pytest
from benchmark_scripts import ROOT, imported


@pytest.fixture(scope="module")
def first_gpu_run():
    with imported("first_gpu_run") as module:
        yield module


@pytest.fixture
def calls(first_gpu_run, tmp_path):
    """`call(steps, seconds) -> names` of the steps that were run, in their order, of a folder of results."""
    out = tmp_path / "gpu"

    def call(steps, seconds=60.0, archive=None, machine="a GPU", fresh=False):
        record = first_gpu_run.Record(out, machine, archive)
        record.load(fresh)
        ran = []
        run = first_gpu_run.run
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(first_gpu_run, "run", lambda command, *rest: ran.append(rest[1].stem) or run(command, *rest))
            call.over = first_gpu_run.go_on(steps, record, seconds, dict(os.environ))
        call.steps = record.steps if not ran else json.loads((out / "done.json").read_text())["steps"]
        return ran

    call.out = out
    return call


SLEEPS = "-c __import__('time').sleep(60)"
FAILS = "-c raise(SystemExit(3))"
WORKS = "-c print('measured')"


def test_what_never_began_comes_before_second_tries(first_gpu_run, calls, capsys):
    step = first_gpu_run.Step
    steps = [step("tests", SLEEPS, 0.3), step("fails", FAILS, 9), step("a", WORKS, 9), step("b", WORKS, 9)]
    assert calls(steps) == ["tests", "fails", "a", "b", "tests", "fails"] and calls.over
    assert {name: (entry["what"], entry["tries"]) for name, entry in calls.steps.items()} == {
        "tests": ("stopped after 0 s", 2),
        "fails": ("exit code 3", 2),
        "a": ("done", 1),
        "b": ("done", 1),
    }
    assert calls(steps) == [] and calls.over  # given up
    assert "measured" in (calls.out / "a.log").read_text()
    assert (calls.out / "tests.log").read_text().count("$ ") == 2  # of both tries
    assert "| not yet |" in (calls.out / "targets.md").read_text()


def test_short_calls_reach_every_step(first_gpu_run, calls):
    """Each call has little more time than a step that never ends within its limit."""
    step = first_gpu_run.Step
    steps = [step("tests", SLEEPS, 0.8), *(step(name, WORKS, 9) for name in "abc")]
    ran = []
    for _ in range(4):
        ran += calls(steps, 1.0)
    assert {"a", "b", "c"} <= set(ran) and all(calls.steps[name]["what"] == "done" for name in "abc")


def test_a_step_that_the_end_of_a_call_stopped_has_the_rest_of_its_limit(first_gpu_run, calls, capsys):
    steps = [first_gpu_run.Step("a", SLEEPS, 1.5), first_gpu_run.Step("b", WORKS, 9)]
    assert calls(steps, 0.5) == ["a"] and not calls.over
    assert "the time is up; call again to go on" in capsys.readouterr().out
    entry = calls.steps["a"]
    assert entry["what"] == "to be gone on with" and entry["tries"] == 0 and 0.5 <= entry["seconds"] < 1.2
    begin = time.perf_counter()
    assert calls(steps) == ["a", "b", "a"]
    assert calls.steps["a"] == {"what": "stopped after 2 s", "tries": 2, "seconds": 0}
    assert time.perf_counter() - begin > 0.3 + 1.5  # the rest, and a second try


def test_a_script_whose_time_was_up_has_used_a_try_only_of_its_whole_limit(first_gpu_run, calls):
    words = "-c print('{seconds}');__import__('time').sleep(.2);raise(SystemExit(75))"
    steps = [first_gpu_run.Step("quality", words, 1.5), first_gpu_run.Step("a", WORKS, 9)]
    ran = calls(steps)
    assert ran[:3] == ["quality", "a", "quality"] and len(ran) > 5  # behind the other, and more often than it has tries
    given_up = calls.steps["quality"]
    assert given_up["tries"] == 2 and given_up["what"] in ("exit code 75", "stopped after 2 s")
    assert (calls.out / "quality.log").read_text().split("\n")[1] == "1"
    assert calls([first_gpu_run.Step("other", words, 100)], 1.0).count("other") > 1  # until the call is over
    assert calls.steps["other"]["tries"] == 0


def test_a_step_within_which_the_run_was_killed_is_not_the_next(first_gpu_run, calls):
    steps = [first_gpu_run.Step(name, WORKS, 9) for name in "ab"]
    calls.out.mkdir()
    begun = {"a": {"what": "begun", "tries": 1, "seconds": 0}}
    (calls.out / "done.json").write_text(json.dumps({"machine": "a GPU", "steps": begun}))
    assert calls(steps) == ["b", "a"] and calls.steps["a"] == {"what": "done", "tries": 2, "seconds": 0}


def test_a_table_that_cannot_be_made_does_not_end_the_run(first_gpu_run, calls, capsys):
    steps = [first_gpu_run.Step(name, WORKS, 9) for name in "ab"]
    calls.out.mkdir()
    (calls.out / "attention.jsonl").write_text('{"half\n{}\n')
    assert calls(steps) == ["a", "b"] and calls.over
    assert "no targets.md (ValueError: " in capsys.readouterr().out


def test_results_travel_in_an_archive(first_gpu_run, calls, tmp_path, capsys):
    archive, out = tmp_path / "gpu.tar.gz", calls.out
    steps = [first_gpu_run.Step("a", WORKS, 9), first_gpu_run.Step("b", FAILS, 9)]
    assert calls(steps, archive=archive) == ["a", "b", "b"]
    assert not list(tmp_path.glob("*.part"))
    log = (out / "a.log").read_text()
    out.rename(tmp_path / "lost")
    assert calls([*steps, first_gpu_run.Step("c", WORKS, 9)], archive=archive) == ["c"]
    assert f"{archive} is unpacked" in capsys.readouterr().out and (out / "a.log").read_text() == log
    assert calls.steps["a"]["what"] == calls.steps["c"]["what"] == "done" and calls.steps["b"]["tries"] == 2
    (out / "a.log").write_text("changed here")
    calls(steps, archive=archive)
    assert "earlier" not in capsys.readouterr().out and (out / "a.log").read_text() == "changed here"
    assert {path.name for path in out.iterdir()} == {"a.log", "b.log", "c.log", "done.json", "targets.md"}


@pytest.mark.parametrize("machine", ["a GPU", "another GPU"])
def test_an_archive_of_other_results_is_kept(first_gpu_run, calls, tmp_path, capsys, machine):
    archive, steps = tmp_path / "gpu.tar.gz", [first_gpu_run.Step(name, WORKS, 9) for name in "ab"]
    calls(steps, archive=archive)
    packed = archive.read_bytes()
    calls.out.rename(tmp_path / "lost")
    assert calls(steps[:1], machine=machine) == ["a"]  # without the archive
    assert calls(steps[1:], machine=machine, archive=archive) == ["b"]
    assert f"which is {archive}.earlier-1 now" in capsys.readouterr().out
    assert (tmp_path / "gpu.tar.gz.earlier-1").read_bytes() == packed
    calls(steps, machine=machine, archive=archive)
    assert not list(tmp_path.glob("*.earlier-2"))


def test_results_of_another_machine_are_put_aside(first_gpu_run, calls, capsys):
    steps = [first_gpu_run.Step("a", WORKS, 9)]
    calls(steps)
    names = {"attention.jsonl", *(f"{step.name}.log" for step in first_gpu_run.STEPS)}
    for name in names:
        (calls.out / name).write_text("")
    (calls.out / "mine.txt").write_text("a file of the user")
    assert calls(steps, machine="another GPU") == ["a"]
    assert "is of a GPU: that is in" in capsys.readouterr().out
    earlier = {path.name for path in (calls.out / "earlier-1").iterdir()}
    assert earlier == {"a.log", "done.json", "targets.md", *names}
    assert {path.name for path in calls.out.iterdir()} == {"a.log", "done.json", "targets.md", "mine.txt", "earlier-1"}
    assert calls(steps, machine="another GPU", fresh=True) == ["a"] and (calls.out / "earlier-2" / "a.log").exists()


def test_archives_that_cannot_be_used_are_refused(first_gpu_run, tmp_path):
    def refusal(*arguments):
        command = [sys.executable, ROOT / "benchmarks" / "first_gpu_run.py", "--toy", "--out", tmp_path / "gpu"]
        result = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert result.returncode == 2 and not (tmp_path / "gpu").exists()
        return result.stderr

    within = refusal("--archive", tmp_path / "gpu" / "all.tar.gz")
    assert "which is packed into it: give a place outside" in within
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "noise").write_bytes(os.urandom(100_000))
    first_gpu_run.pack(tmp_path / "some", tmp_path / "whole")
    (tmp_path / "torn").write_bytes((tmp_path / "whole").read_bytes()[:50_000])
    (tmp_path / "notes").write_text("no archive")
    for name in ("torn", "notes"):
        assert "is there and is no whole archive: give another name" in refusal("--archive", tmp_path / name)
    assert first_gpu_run.is_whole(tmp_path / "whole")


@pytest.mark.skipif(os.name != "posix", reason="groups of processes are POSIX's")
def test_what_a_step_started_ends_with_it(first_gpu_run, tmp_path):
    """Also where the step itself has ended: what is left would share the GPU with the next one."""
    child = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    log = tmp_path / "step.log"
    for words, limit, code in (
        (child, None, 0),
        (f"{child}; sys.stdout.flush(); import time; time.sleep(60)", 2, None),
    ):
        assert first_gpu_run.run([sys.executable, "-c", words], limit, log, True, dict(os.environ)) == code
        pid = int(log.read_text().split("\n")[-2])
        until = time.perf_counter() + 10
        while alive(pid):
            assert time.perf_counter() < until
            time.sleep(0.05)


def alive(pid):
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(listed) and not listed.startswith("Z")


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGTERM")
@pytest.mark.parametrize("number", [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)])
def test_a_run_that_is_terminated_keeps_what_it_was_at(tmp_path, number):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import first_gpu_run as f; "
        f"f.TOY = (f.Step('long', {SLEEPS!r}, 50),); f.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, "--toy", "--out", str(tmp_path)])
    until = time.perf_counter() + 60
    while not (tmp_path / "long.log").exists() and time.perf_counter() < until:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    entry = json.loads((tmp_path / "done.json").read_text())["steps"]["long"]
    assert entry["what"] == "to be gone on with" and entry["tries"] == 0


def test_the_limits_are_what_is_promised(first_gpu_run):
    steps = first_gpu_run.STEPS
    ends = dict(zip((step.name for step in steps), accumulate(step.limit for step in steps), strict=True))
    text = " ".join(first_gpu_run.__doc__.split())
    promised = [60 * int(minutes) for minutes in re.findall(r"after (\d+)", text.partition("at the latest")[2])]
    reached = [ends[name] for name in ("kernels", "attention-14b", "tests", "step-1.3b", "cogvideox")]
    assert len(promised) == 5 and all(end <= by < end + 60 for end, by in zip(reached, promised, strict=True))
    assert promised[3] <= 1500 and promised[4] <= 2 * 1500  # seconds of a call


def test_the_steps_are_command_lines_of_their_scripts(first_gpu_run):
    """No GPU is there to try them on: each option and each name it is given stands in the script or what it reads."""
    scripts = set()
    for step in first_gpu_run.STEPS:
        script, *words = step.words.split()
        script = script.removeprefix("{here}/")
        scripts.add(script)
        text = (ROOT / "benchmarks" / script).read_text()
        known = text + "".join(
            (ROOT / "benchmarks" / f"{name}.py").read_text() for name in ("attention", "common", "step_models")
        )
        for word in words:
            name = word.removeprefix("--")
            if word.startswith("--"):
                written = f'"{word}"' in text or re.search(rf"^ +{name}: ", text, re.MULTILINE)
            else:
                written = re.fullmatch(r"[\d.]+|cuda|\{out\}|\{seconds\}", word) or f'"{word}"' in known
            assert written, f"{script} knows no {word}"
    assert scripts == {"kernels.py", "attention.py", "gpu_tests.py", "step.py", "quality.py"}
