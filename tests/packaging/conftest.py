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

    return run


@pytest.fixture
def on_path(tmp_path: Path) -> Path:
    """A folder to put on the path, in which the checkout is `vidaccel`."""
    folder = tmp_path / "installed"
    folder.mkdir()
    (folder / "vidaccel").symlink_to(ROOT, target_is_directory=True)
    return folder
