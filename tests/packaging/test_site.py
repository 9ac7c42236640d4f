"""The documentation site: every page is in its menu, and every link leads somewhere. `make docs` builds it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest

import vidaccel
from vidaccel.attention import METHODS
from vidaccel.lora.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def stage():
    folder = ROOT / "docs" / "site"
    spec = importlib.util.spec_from_file_location("stage", folder / "stage.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["stage"] = module
    before = list(sys.path)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    yield module
    for name in ("stage", "links"):  # other tests look at what is loaded
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def pages(stage):
    return {page.site: page for page in stage.finished(command_line=False)[0]}


def test_there_is_a_page_for_each_method_and_recipe(pages):
    assert {f"methods/{name}.md" for name in METHODS} <= pages.keys()
    assert {f"recipes/{name}.md" for name in RECIPES} <= pages.keys()


def test_the_lists_name_each_of_them(pages):
    for kind, names in (("methods", METHODS), ("recipes", RECIPES)):
        listed = re.findall(r"\| \[`(\w+)`\]\(\1\.md\)", pages[f"{kind}/index.md"].text)
        assert sorted(listed) == sorted(names)


def test_each_public_name_is_in_the_reference(pages):
    """By the object, since pages name the module that defines it."""
    text = "\n".join(page.text for page in pages.values())
    paths = re.findall(r"^::: (vidaccel\.[\w.]+)$", text, re.MULTILINE)
    told = [getattr(importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in paths]
    public = {name: getattr(vidaccel, name) for name in vidaccel.__all__}
    code = {name: value for name, value in public.items() if inspect.isclass(value) or inspect.isfunction(value)}
    assert len(code) > 30
    assert [name for name, value in code.items() if not any(value is each for each in told)] == []


def test_the_methods_that_leave_nothing_dense_are_named(pages):
    said = re.search(r"every method but ([^,]+(?:, [^,]+)*), which are as published", pages["start/python.md"].text)
    dense_nowhere = {name for name, method in METHODS.items() if method().schedule == vidaccel.DenseSchedule()}
    assert set(re.findall(r"`(\w+)`", said[1])) == dense_nowhere


def test_a_link_to_nothing_is_refused(stage, tmp_path):
    places = stage.Places([], tmp_path, None)
    with pytest.raises(stage.StageError, match="links to gone.md"):
        places.target(stage.Page("a.md", "docs/a.md", ""), "gone.md", "")


def test_a_page_outside_the_menu_is_refused(stage):
    with pytest.raises(stage.StageError, match="left.md is a page, and not in the menu"):
        stage.navigation([{"Start": ["index.md"]}], ["index.md", "left.md"])


def test_code_on_the_pages_is_python(pages):
    for page in pages.values():
        for block in re.findall(r"^```python\n(.*?)^```", page.text, re.MULTILINE | re.DOTALL):
            compile(block, page.source, "exec")


def test_the_pages_have_the_tables_of_the_results():
    sys.path.insert(0, str(ROOT / "docs" / "site"))
    try:
        import tables
    finally:
        sys.path.pop(0)
    sys.modules.pop("tables")
    assert not tables.stale(), "python docs/site/tables.py writes them"
    comment = "<!-- table\nfile: benchmarks/results/quality.csv\nwhere: {method: [dense]}\ncolumns: {method: a}\n-->\n"
    filled = tables.fill(comment, ROOT, "x")
    assert filled == f"{comment}\n| a |\n| --- |\n| dense |\n" and tables.fill(filled, ROOT, "x") == filled
    with pytest.raises(tables.TableError, match="no row of .* has 'denser' as its method"):
        tables.fill(filled.replace("[dense]", "[denser]"), ROOT, "x")
