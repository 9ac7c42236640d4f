"""No module of the package needs, directly or through others, one that needs it: imports in functions and those for
types count as well, since a reader follows them too."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Mapping
from pathlib import Path

import pytest


def imports_of(module: str, source: str, is_package: bool, modules: set[str]) -> set[str]:
    """The modules of the package that a file imports anywhere, by dotted name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + is_package]
        base = ".".join([*parts, *([node.module] if node.module else [])])
        for alias in node.names:
            # `from .. import name` may name a module, and a name of a package comes from its `__init__`.
            found.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base)
    return (found & modules) - {module}


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """A circle of imports, first and last the same; empty where there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def _sources(package_folders: dict[str, Path]) -> dict[str, tuple[str, bool]]:
    """Source and whether it is an `__init__`, by module. The root's looks its names up on first use."""
    return {
        name if file.stem == "__init__" else f"{name}.{file.stem}": (
            file.read_text(encoding="utf-8"),
            file.stem == "__init__",
        )
        for name, folder in package_folders.items()
        for file in folder.glob("*.py")
        if not (name == "vidaccel" and file.stem == "__init__")
    }


def test_there_is_no_circle(package_folders):
    sources = _sources(package_folders)
    graph = {name: imports_of(name, source, init, set(sources)) for name, (source, init) in sources.items()}
    assert sum(map(len, graph.values())) > 200  # it does see imports
    assert circle(graph) == []


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        ({"p.a": "from .b import x", "p.b": "from .c import x", "p.c": ""}, False),
        ({"p.a": "from .b import x", "p.b": "from .c import x", "p.c": "from . import a"}, True),
        ({"p.a": "from .b import x", "p.b": "def f():\n    from .a import y"}, True),
        ({"p.a": "from .b import x", "p.b": "if TYPE_CHECKING:\n    from .a import y"}, True),
    ],
)
def test_the_check_finds_what_it_is_for(sources, found):
    graph = {name: imports_of(name, source, False, set(sources)) for name, source in sources.items()}
    assert bool(circle(graph)) == found
