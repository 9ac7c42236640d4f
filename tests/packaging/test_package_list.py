"""The lists that are written by hand agree with the disk and with one another."""

from __future__ import annotations

import re
from pathlib import Path

from vidaccel.generation.packages import COMMAND_LINE, SHOWING, requirements_in

# Folders of the checkout that hold Python files but are not installed.
NOT_INSTALLED = {
    "benchmarks",
    "build",
    "demo_out",
    "dist",
    "docs",
    "example_workflows",
    "examples",
    "notebooks",
    "tests",
}


def _folders(folder: Path, name: str = "vidaccel") -> dict[str, Path]:
    """Every folder that holds Python files, by dotted name."""
    found = {name: folder} if any(folder.glob("*.py")) else {}
    for child in sorted(folder.iterdir()):
        hidden = child.name.startswith((".", "_")) or child.name.endswith(".egg-info")
        environment = (child / "pyvenv.cfg").exists()
        skipped = name == "vidaccel" and child.name in NOT_INSTALLED
        if child.is_dir() and not (hidden or environment or skipped):
            found |= _folders(child, f"{name}.{child.name}")
    return found


def test_packages_are_the_folders_with_code(package_folders, root):
    assert package_folders == _folders(root)


def test_every_package_has_an_init(package_folders):
    assert [name for name, folder in package_folders.items() if not (folder / "__init__.py").exists()] == []


def test_packages_are_sorted(package_folders):
    assert list(package_folders) == sorted(package_folders)


def test_package_data_patterns_match_something(project, package_folders):
    """A pattern that matches nothing is a file that was moved and would be missing in the wheel."""
    for name, patterns in project["tool"]["setuptools"]["package-data"].items():
        for pattern in patterns:
            assert [file for file in package_folders[name].glob(pattern) if file.is_file()], (name, pattern)


def _name(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement).group().lower().replace("_", "-")


def _pins(root: Path) -> dict[str, str]:
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {_name(name): version for name, version in pairs}


def test_what_is_required_is_pinned(project, root):
    extras = project["project"]["optional-dependencies"]
    required = project["project"]["dependencies"] + extras["test"] + extras["docs"]
    assert {_name(requirement) for requirement in required} - set(_pins(root)) == set()


def test_pins_are_above_the_lower_bounds(project, root):
    from packaging.requirements import Requirement

    pins = _pins(root)
    extras = project["project"]["optional-dependencies"]
    for text in project["project"]["dependencies"] + extras["test"] + extras["docs"]:
        requirement = Requirement(text)
        assert pins[_name(requirement.name)] in requirement.specifier, text


def test_a_copied_pack_is_told_all_that_the_command_line_needs(project):
    assert SHOWING == ("packaging", "rich", "typer")  # as the first lines of the file say
    asked = {line for line in project["project"]["dependencies"] if _name(line) != "torch"}
    assert set(requirements_in(COMMAND_LINE)) == asked


def test_pre_commit_runs_the_pinned_ruff(root):
    versions = re.findall(r"ruff==([\d.]+)", (root / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert versions
    assert set(versions) == {_pins(root)["ruff"]}
