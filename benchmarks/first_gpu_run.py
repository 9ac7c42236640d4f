"""Everything that wants a GPU, the most valuable first, in one command that may be broken off and called again.

    python benchmarks/first_gpu_run.py                         # on the GPU that is there
    python benchmarks/first_gpu_run.py --seconds 500           # what is not done by then, the next call goes on with
    python benchmarks/first_gpu_run.py --archive gpu.tar.gz    # on a machine that keeps no folders
    python benchmarks/first_gpu_run.py --toy                   # on a CPU in Triton's interpreter: whether it runs

A call ends after 25 minutes, or `--seconds`. Each step is a process of its own and has a limit, so that at the latest

- after 4 minutes the parts of a sparse call are measured (`kernels.py`), after 9 attention of Wan 14B against other
  implementations (`attention.py`), after 16 the kernels' tests have run (`gpu_tests.py`), and after 23 a denoising step
  of both sizes of Wan is measured (`step.py`): the first call;
- after 44 minutes so are quality on the demo model (`quality.py`) and attention of other models, forward and backward:
  the second call.

In `benchmarks/results/gpu` are what each step printed (`STEP.log`), what is done (`done.json`) and, after each step,
what was expected beside what was measured (`targets.md`). A step that was stopped because the call was over has the
rest of its limit in the next call, and one that ended by itself, because its own time was up, when the others have had
their turn. One that failed, or took all of its limit, is tried once more when all others have had theirs. Each goes on
with what it had written. On another GPU, and with other versions of torch, triton or diffusers, all is measured anew,
and what is there is put aside. `step.py` and `quality.py` need diffusers, `gpu_tests.py` pytest.

With `--archive` the folder is packed into that file before and after each step, and a call that finds the file and no
results in the folder unpacks it first. So on a machine that starts bare: bring the file, and take it away again. An
archive of other results than those in the folder gets another name, and is not lost.
"""

from __future__ import annotations

import argparse  # not typer: machines with a GPU to measure on often have torch and nothing else
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import gpu_targets
from common import RESULTS, UNFINISHED, gpu_and_versions, write_whole

HERE = Path(__file__).parent
TRIES = 2
BEHIND = "its time was up: behind the others"
OURS = ("*.log", "done.json", "targets.md", "tests.json", "attention.*", "quality.*", "kernels-*", "step-*")


class Step(NamedTuple):
    """What Python runs, and the seconds after which it is stopped, None for never.

    In the words, `{here}` is the folder of the scripts, `{out}` that of the results, and `{seconds}` the time after
    which a script that ends by itself is to begin nothing new.
    """

    name: str
    words: str
    limit: float | None


STEPS = (
    Step("kernels", "{here}/kernels.py --out {out}", 240),
    Step(
        "attention-14b",
        "{here}/attention.py --shapes wan-14b-720p --densities .25 .1 .05 --repeats 10 --out {out}",
        300,
    ),
    Step("tests", "{here}/gpu_tests.py --out {out}", 420),
    Step(
        "step-14b",
        "{here}/step.py --model wan-14b --height 720 --width 1280 --layers 8 --density .1 --out {out}",
        240,
    ),
    Step("step-1.3b", "{here}/step.py --model wan-1.3b --density .2 --out {out}", 180),
    Step("quality", "{here}/quality.py --device cuda --seconds {seconds} --out {out}", 420),
    Step("attention-1.3b", "{here}/attention.py --shapes wan-1.3b-480p --repeats 10 --out {out}", 240),
    Step(
        "attention-hunyuan",
        "{here}/attention.py --shapes hunyuan-720p --densities .25 .1 --repeats 5 --out {out}",
        240,
    ),
    Step(
        "backward",
        "{here}/attention.py --shapes wan-1.3b-480p --backward --densities .25 --repeats 5 --out {out}",
        200,
    ),
    Step("cogvideox", "{here}/kernels.py --shape cogvideox --parts forward variants --out {out}", 150),
)
TOY = (
    Step(
        "kernels",
        "{here}/kernels.py --shape toy --density .8 --device cpu --dtype float32 --repeats 1 --chosen "
        "--parts forward variants --out {out}",
        None,
    ),
)


class Record:
    """What is known of a machine's steps: `done.json` in the folder of the results, and the archive of that folder.

    Args:
        machine: of which the results are.
        archive: packed whenever something changes; None for none.

    Attributes:
        steps: name -> `what` ("done", or what came of it), `tries` that are over or under way, and `seconds` that a try
            has had in earlier calls.
    """

    def __init__(self, out: Path, machine: str, archive: Path | None = None) -> None:
        self.out, self.machine, self.archive = out, machine, archive
        self.steps: dict[str, dict[str, Any]] = {}

    def load(self, fresh: bool = False) -> None:
        """Go on with what is there; what is of another machine, or not wanted, is put aside."""
        out, file = self.out, self.out / "done.json"
        if self.archive is not None and self.archive.exists():
            if not file.exists():
                unpack(self.archive, out)
            elif not is_of(self.archive, file):
                kept = next(to for n in range(1, 10**6) if not (to := Path(f"{self.archive}.earlier-{n}")).exists())
                self.archive.rename(kept)
                print(f"{out} has other results than {self.archive}, which is {kept} now", flush=True)
        out.mkdir(parents=True, exist_ok=True)
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if before and (fresh or before["machine"] != self.machine):
            aside = put_aside(out)
            print(
                f"{out} is of {before['machine']}: that is in {aside} now, all is measured anew for {self.machine}",
                flush=True,
            )
        else:
            self.steps = before.get("steps", {})

    def of(self, name: str) -> dict[str, Any]:
        """The entry of a step."""
        return self.steps.setdefault(name, {"what": "not begun", "tries": 0, "seconds": 0})

    def save(self) -> None:
        """Write all that is made of results."""
        write_whole(self.out / "done.json", json.dumps({"machine": self.machine, "steps": self.steps}, indent=1) + "\n")
        try:
            gpu_targets.write(self.out)
        except Exception as error:  # a table of results must not cost those that are to come
            print(f"no targets.md ({type(error).__name__}: {error})", flush=True)
        if self.archive is not None:
            pack(self.out, self.archive)

    def next(self, steps: Sequence[Step]) -> Step | None:
        """The step whose turn it is: no second try of one before all others have had their first, and those that gave
        the turn up last."""
        to_do = [step for step in steps if self.of(step.name)["what"] != "done" and self.of(step.name)["tries"] < TRIES]
        return min(to_do, key=self._turn, default=None)

    def _turn(self, step: Step) -> tuple[int, bool]:
        entry = self.of(step.name)
        return entry["tries"], entry["what"] == BEHIND


def put_aside(out: Path) -> Path:
    """Move the results of a folder into a folder within it."""
    aside = next(path for n in range(1, 10**6) if not (path := out / f"earlier-{n}").exists())
    found = {path for pattern in OURS for path in out.glob(pattern)}
    aside.mkdir()
    _move(found, aside)
    return aside


def _move(files: Iterable[Path], folder: Path) -> None:
    """Into a folder, `done.json` last: where it is, all the others are."""
    for path in sorted(files, key=lambda path: path.name == "done.json"):
        path.rename(folder / path.name)


def pack(folder: Path, archive: Path) -> None:
    """A folder's contents as a .tar.gz, which is whole at any moment."""
    beside = archive.with_name(f"{archive.name}.part")
    with tarfile.open(beside, "w:gz") as file:
        file.add(folder, arcname=".")
    os.replace(beside, archive)


def is_whole(archive: Path) -> bool:
    """Whether a file is an archive that can be read to its end."""
    try:
        with tarfile.open(archive) as file:
            return bool(file.getmembers())
    except (tarfile.TarError, EOFError, OSError):
        return False


def is_of(archive: Path, done: Path) -> bool:
    """Whether what was packed had this record of what is done, or one before it: of the same machine, and no more."""
    with tarfile.open(archive) as file:
        try:
            packed = json.loads(file.extractfile("./done.json").read())
        except KeyError:
            return False
    here = json.loads(done.read_text(encoding="utf-8"))
    finished = {name for name, entry in packed["steps"].items() if entry["what"] == "done"}
    return packed["machine"] == here["machine"] and finished <= {
        name for name, entry in here["steps"].items() if entry["what"] == "done"
    }


def unpack(archive: Path, folder: Path) -> None:
    """What `pack` made, in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as beside, tarfile.open(archive) as file:
        # The first versions of Python 3.11 have no filters.
        file.extractall(beside, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        _move(Path(beside).iterdir(), folder)
    print(f"{archive} is unpacked: what it has is gone on with", flush=True)


def run(command: Sequence[str], limit: float | None, log: Path, anew: bool, environment: dict[str, str]) -> int | None:
    """The exit code of a command, None when it was stopped after `limit` seconds; what it prints goes to `log`."""
    with log.open("w" if anew else "a") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, process_group=0)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end(process)


def end(process: subprocess.Popen) -> None:
    """End a process and those that it started, which would share the GPU with what is measured next."""
    if os.name == "posix":
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def go_on(steps: Sequence[Step], record: Record, seconds: float, environment: dict[str, str]) -> bool:
    """Run what is to be done, for so many seconds; whether nothing is left to do."""
    begin = time.perf_counter()
    while (step := record.next(steps)) is not None:
        start = time.perf_counter()
        left = seconds - (start - begin)
        if left <= 0:
            print("the time is up; call again to go on", flush=True)
            return False
        entry = record.of(step.name)
        rest = float("inf") if step.limit is None else max(0.1, step.limit - entry["seconds"])
        available = min(rest, left)
        words = {"here": HERE, "out": record.out, "seconds": int(0.7 * available)}
        command = [sys.executable, *(word.format(**words) for word in step.words.split())]
        anew = entry["tries"] == entry["seconds"] == 0
        # Written before it begins: should this process be killed, the step is not the first to be tried again.
        entry |= {"what": "begun", "tries": entry["tries"] + 1}
        record.save()
        over, code = False, None
        try:
            code = run(command, available, record.out / f"{step.name}.log", anew, environment)
            over = code not in (None, UNFINISHED) or time.perf_counter() - start >= rest
        finally:
            spent = time.perf_counter() - start
            if over:
                ended = f"stopped after {step.limit:.0f} s" if code is None else f"exit code {code}"
                entry |= {"what": "done" if code == 0 else ended, "seconds": 0}
            else:  # the call is over, and not the try
                what = BEHIND if code == UNFINISHED else "to be gone on with"
                entry |= {"what": what, "tries": entry["tries"] - 1}
                entry["seconds"] = round(entry["seconds"] + spent, 1)
            record.save()
            print(f"{step.name}: {entry['what']}, {spent:.0f} s", flush=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1500, help="after which it ends (25 minutes by default)")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--fresh", action="store_true", help="do again what is done")
    parser.add_argument("--archive", type=Path, help="FILE.tar.gz that the results are packed into, and begun from")
    parser.add_argument("--out", type=Path, help="folder  [results/gpu; results/gpu_toy of --toy]")
    arguments = parser.parse_args()
    out, archive = arguments.out or RESULTS / ("gpu_toy" if arguments.toy else "gpu"), arguments.archive
    if archive is not None:
        if archive.resolve().is_relative_to(out.resolve()):
            parser.error(f"--archive {archive} is in --out {out}, which is packed into it: give a place outside.")
        if archive.exists() and not is_whole(archive):
            parser.error(f"--archive {archive} is there and is no whole archive: give another name, or remove it.")
        archive.parent.mkdir(parents=True, exist_ok=True)
    # As Ctrl-C does: the step is ended with this process, and what it was is written. Windows has no hang-ups.
    for name in ("SIGTERM", "SIGHUP"):
        if number := getattr(signal, name, None):
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    record = Record(out, "the interpreter" if arguments.toy else gpu_and_versions(), archive)
    record.load(arguments.fresh)
    steps = TOY if arguments.toy else STEPS
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **({"TRITON_INTERPRET": "1"} if arguments.toy else {})}
    if not go_on(steps, record, arguments.seconds, environment):
        return
    given_up = {step.name: record.of(step.name)["what"] for step in steps if record.of(step.name)["what"] != "done"}
    for name, what in given_up.items():
        print(f"{name}: given up after {TRIES} tries ({what}). {out / name}.log says why.")
    if given_up:
        sys.exit(f"To try it again, take it out of {out / 'done.json'}.")


if __name__ == "__main__":
    main()
