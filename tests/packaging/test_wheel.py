"""The source distribution suffices to build the wheel, which holds the package and its data, no more, and installs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import vidaccel


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A source distribution, built from a copy of the checkout, since building leaves files in the folder."""
    folder = tmp_path_factory.mktemp("sdist")
    leave_out = shutil.ignore_patterns(
        ".*", "__pycache__", "build", "dist", "*.egg-info", "demo_out", "*venv*", "results"
    )
    shutil.copytree(root, folder / "checkout", ignore=leave_out, symlinks=True)
    build = "from setuptools.build_meta import build_sdist; build_sdist('..')"
    _succeeds([sys.executable, "-c", build], folder / "checkout")
    [built] = folder.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """The wheel that pip makes of the source distribution, as it does for who installs that."""
    _succeeds([*_PIP, "wheel", *_AS_IT_IS, "--no-build-isolation", "--wheel-dir", str(sdist.parent), str(sdist)])
    [built] = sdist.parent.glob("*.whl")
    return built


_PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
_AS_IT_IS = ["--no-deps", "--no-index", "--quiet"]


def _succeeds(command: list[str], folder: Path | None = None) -> None:
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr


def _files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_name_says_any_platform(wheel):
    assert wheel.name == f"vidaccel-{vidaccel.__version__}-py3-none-any.whl"


def test_it_holds_the_modules_and_the_data_and_nothing_else(wheel, root, project, package_folders):
    expected = set()
    for name, folder in package_folders.items():
        patterns = ["*.py", *project["tool"]["setuptools"]["package-data"].get(name, [])]
        expected |= {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    expected = {"vidaccel/" + file.relative_to(root).as_posix() for file in expected}
    held = {name for name in _files(wheel) if ".dist-info/" not in name}
    assert held == expected


def test_it_holds_the_demo_model_and_the_templates(wheel):
    held = _files(wheel)
    assert "vidaccel/demo/weights/model_index.json" in held
    assert [name for name in held if name.startswith("vidaccel/demo/weights/") and name.endswith(".safetensors")]
    assert [name for name in held if name.endswith(".j2")]


def test_it_holds_the_licence_and_the_command(wheel):
    held = _files(wheel)
    assert [name for name in held if name.endswith(".dist-info/licenses/LICENSE")]
    with zipfile.ZipFile(wheel) as archive:
        [entry_points] = [name for name in held if name.endswith("entry_points.txt")]
        assert "vidaccel = vidaccel.cli:main" in archive.read(entry_points).decode()


def test_the_source_has_no_more_than_the_wheel_and_what_builds_it(sdist, wheel):
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    assert {name.removeprefix("vidaccel/") for name in _files(wheel) if ".dist-info/" not in name} <= held
    rest = held - {name.removeprefix("vidaccel/") for name in _files(wheel)}
    metadata = {name for name in rest if ".egg-info/" in name}
    assert rest - metadata == {"LICENSE", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}


def test_it_works_from_where_it_is_installed(wheel, tmp_path, fresh, root):
    unpacked = tmp_path / "site"
    _succeeds([*_PIP, "install", *_AS_IT_IS, "--no-compile", "--target", str(unpacked), str(wheel)])
    assert (unpacked / "bin" / "vidaccel").is_file()
    out = fresh(
        """
        import torch, vidaccel
        mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
        plan = vidaccel.BlockPlan.from_block_mask(mask, 4, 4, 8, 8)
        q = torch.randn(1, 1, 8, 16)
        out = vidaccel.sparse_attention(q, q, q, plan, backend="reference")
        torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q))
        print(vidaccel.__file__, vidaccel.demo.path(), sep="\\n")
        """,
        unpacked,
    )
    for line in out.splitlines():
        assert Path(line).is_relative_to(unpacked)
    assert (Path(out.splitlines()[1]) / "model_index.json").exists()
