"""The names of the root: all there, looked up on first use, and cheap to import."""

from __future__ import annotations

import ast
import re
import types

import pytest

import vidaccel


def test_the_version_stands_in_one_place(project, root):
    """pip takes it from the source, and so does ComfyUI's registry, which reads a line of this form."""
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "vidaccel.__version__"}
    source = (root / project["tool"]["comfy"]["version"]["path"]).read_text(encoding="utf-8")
    assert re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE) == [vidaccel.__version__]


@pytest.mark.parametrize("name", vidaccel.__all__)
def test_each_name_is_there(name):
    value = getattr(vidaccel, name)
    assert value is not None
    if isinstance(value, types.ModuleType):
        assert value.__name__ == f"vidaccel.{name}"
    elif hasattr(value, "__module__"):
        assert value.__module__.startswith("vidaccel.")


def test_all_and_dir_agree():
    assert len(set(vidaccel.__all__)) == len(vidaccel.__all__)
    assert dir(vidaccel) == sorted(vidaccel.__all__)


def test_unknown_name():
    with pytest.raises(AttributeError, match=r"module 'vidaccel' has no attribute 'acelerate'"):
        vidaccel.acelerate  # noqa: B018


def test_import_is_quick(fresh, root):
    """Under 0.2 s on top of the bare interpreter; the best of five, since other work may run beside."""
    out = fresh(f"""
        import importlib.util, sys, time
        spec = importlib.util.spec_from_file_location("pack", {str(root / "__init__.py")!r})
        best = float("inf")
        for _ in range(5):
            for name in ("vidaccel", "logging"):
                sys.modules.pop(name, None)
            start = time.perf_counter()
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
            best = min(best, time.perf_counter() - start)
        print(best)
    """)
    assert float(out) < 0.2


def test_command_line_entry(project, root):
    """The `vidaccel` command names a function that exists."""
    module, function = project["project"]["scripts"]["vidaccel"].split(":")
    tree = ast.parse((root / module.removeprefix("vidaccel.") / "__init__.py").read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_changelog_has_the_version(root):
    assert re.search(
        rf"^## \[{re.escape(vidaccel.__version__)}\]", (root / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE
    )


def test_rooms_are_there_after_a_plain_import(fresh, on_path):
    """A path in full, such as those of messages and pages."""
    out = fresh(
        """
        import vidaccel
        print(vidaccel.pipelines.presets.measure_mag_ratios.__name__, vidaccel.attention.Backend.__name__)
        print(vidaccel.generation.__name__, vidaccel.lora.run.__name__)
        """,
        on_path,
    )
    assert out.split() == ["measure_mag_ratios", "Backend", "vidaccel.generation", "run"]
