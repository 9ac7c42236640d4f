"""The package as files, and fresh Python processes to import it in."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the checkout, which is the package."""
    return ROOT


@pytest.fixture(scope="session")
def project() -> dict:
    """The contents of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def package_folders(project: dict) -> dict[str, Path]:
    """Each package that is installed, with its folder in the checkout."""
    return {name: ROOT.joinpath(*name.split(".")[1:]) for name in project["tool"]["setuptools"]["packages"]}


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[..., str]:
    """Run code in a new process, in an empty folder, and return what it prints.

    `paths` are the only folders from which it can import `vidaccel`: site-packages is on the path too, but its .pth
    files, by which an editable install works, are not read.
    """

    def run(code: str, *paths: Path, input_folder: Path = tmp_path) -> str:
        return run_fresh(code, *paths, input_folder=input_folder)

    return run


def run_fresh(code: str, *paths: Path, input_folder: Path) -> str:
    """See `fresh`."""
    site_packages = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, paths), *site_packages])}
    done = subprocess.run(
        [sys.executable, "-S", "-c", textwrap.dedent(code)],
        cwd=input_folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


FORK = """
import os, sys, traceback
{start}
for name, code in {codes!r}.items():
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0, name
        continue
    try:
        with open({folder!r} + "/" + name, "w") as sys.stdout:
            exec(code, globals())
        os._exit(0)
    except SystemExit as end:
        os._exit(1 if end.code else 0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
"""


def run_fresh_each(start: str, codes: dict[str, str], *paths: Path, folder: Path) -> dict[str, str]:
    """Run each of several codes in a new process, in a folder, after the same `start`; return what each prints.

    Where processes can be forked, `start` runs once, in a process that runs nothing else: imports take seconds.
    """
    if sys.platform != "linux":
        return {name: run_fresh(start + code, *paths, input_folder=folder) for name, code in codes.items()}
    printed = folder / "printed"
    printed.mkdir()
    run_fresh(FORK.format(start=start, codes=codes, folder=str(printed)), *paths, input_folder=folder)
    return {name: (printed / name).read_text() for name in codes}


@pytest.fixture
def on_path(tmp_path: Path) -> Path:
    """A folder to put on the path, in which the checkout is `vidaccel`."""
    return put_on_path(tmp_path)


def put_on_path(parent: Path) -> Path:
    folder = parent / "installed"
    folder.mkdir()
    (folder / "vidaccel").symlink_to(ROOT, target_is_directory=True)
    return folder


@pytest.fixture(scope="session")
def fresh_each(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """`fresh_each(start, codes, folder)`: see `run_fresh_each`; `vidaccel` is the checkout."""

    def run(start: str, codes: dict[str, str], folder: Path) -> dict[str, str]:
        return run_fresh_each(start, codes, put_on_path(tmp_path_factory.mktemp("path")), folder=folder)

    return run
