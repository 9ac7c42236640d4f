"""A copy that lacks packages: one line before anything is read, and what needs none of them works."""

from __future__ import annotations

import runpy
import sys

import pytest

from vidaccel.generation import packages

WITH_MODELS = (
    ("generate", "a dot", "--model", "demo", "--compare"),
    ("demo",),
    ("tune", "--model", "demo", "--min-psnr", "28", "--out", "tuned"),
    ("waterfall", "demo-tangent"),
    ("convert", "source", "target"),
    ("convert", "turbowan", "source", "target"),
    ("convert", "fastwan", "source", "target"),
    ("adapt", "lora", "--config", "a.yaml"),
    ("break-even", "--model", "demo"),
    ("info", "--forecast"),
    ("methods", "--families"),
)
WITHOUT_MODELS = (("info",), ("methods",), ("presets",), ("presets", "demo-cache"), ("--help",), ("generate", "--help"))


@pytest.fixture
def needs(tmp_path, monkeypatch):
    """`needs(*lines)`: what the command line needs is that."""

    def write(*lines):
        (tmp_path / "more.txt").write_text("\n".join(lines))
        (tmp_path / "needs.txt").write_text("# why\n-r more.txt\ntorch>=2\n")
        monkeypatch.setattr(packages, "COMMAND_LINE", tmp_path / "needs.txt")

    monkeypatch.chdir(tmp_path)
    return write


@pytest.mark.parametrize("command", WITH_MODELS, ids=lambda command: " ".join(command[:2]))
def test_commands_with_models_say_what_is_missing(vidaccel, needs, tmp_path, command):
    needs("no_such_package>=1", "typer>=99")
    result = vidaccel(*command)
    assert result.exit_code == 1, (result.output, result.exception)
    assert result.stderr.startswith("Error: this needs no_such_package>=1 (not installed), typer>=99 (found ")
    assert result.stderr.endswith("needs.txt, with this Python.\n") and result.stderr.count("\n") == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["more.txt", "needs.txt"]


@pytest.mark.parametrize("command", WITHOUT_MODELS, ids=" ".join)
def test_commands_without_models_need_none_of_them(vidaccel, needs, command):
    needs("no_such_package>=1")
    assert vidaccel(*command).exit_code == 0


def test_break_even_of_heads_needs_none_of_them(vidaccel, needs):
    needs("no_such_package>=1")
    assert "no_such_package" not in vidaccel("break-even", "--heads", 2, "--head-dim", 0).stderr


def test_what_shows_the_help_is_asked_for_first(needs):
    needs("no_such_package>=1", "typer>=99")
    with pytest.raises(SystemExit, match=r"^Error: this needs typer>=99 \(found .*needs\.txt, with this Python\.$"):
        runpy.run_module("vidaccel", run_name="__main__")


def test_what_reads_the_requirements_is_one_of_them(needs, tmp_path, monkeypatch):
    """Without a file of them, as where pip installed the package, it is not asked for."""
    needs("no_such_package>=1")
    for name in [name for name in sys.modules if name.split(".")[0] == "packaging"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "packaging", None)
    with pytest.raises(SystemExit, match=r"^Error: this needs packaging \(not installed\): pip .*needs\.txt"):
        runpy.run_module("vidaccel", run_name="__main__")
    assert packages.lacking(tmp_path / "none.txt") == []
