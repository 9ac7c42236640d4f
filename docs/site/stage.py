"""Lay out the tree that the site is built from: `python docs/site/stage.py`, which `make docs` does.

The pages of `docs/` are taken as they are. Others are made here from what the repository has: the sections of
CONTRIBUTING.md, the changelog, the tables of `benchmarks/results/`, the help pages of the nodes, the scripts of
`examples/`, the options of the command line. So nothing is written twice, and all of it can be read without a site too.
The tool that makes HTML of the tree needs no plugin but mkdocstrings, for the pages of the API.
"""

from __future__ import annotations

import ast
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from links import anchor_of, map_links

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "docs" / "site" / "mkdocs.yml"
PICTURES = (".png", ".jpg", ".svg")

# Page of the site -> its title, and the sections of CONTRIBUTING.md that it has.
CONTRIBUTING = {
    "develop/contributing.md": ("Contributing", ("Set up", "On a GPU", "Without a GPU", "House rules", "Clean room")),
    "develop/design.md": ("Design and non-goals", ("The one idea", "Non-goals", "The tree")),
    "develop/extend.md": ("How to add a method, a family, a recipe", ("Extend it from outside", "How to add")),
}
README = {"": "index.md"}  # which is no page, but may be linked to


@dataclass(frozen=True)
class Page:
    """A page of the site.

    Args:
        site: its path in the tree.
        source: the file in the repository that it is from, to which its links are relative.
        text: Markdown.
    """

    site: str
    source: str
    text: str


class StageError(ValueError):
    """What the tree cannot be made of."""


def pages(root: Path = ROOT, command_line: bool = True) -> list[Page]:
    """Every page, with links as they are in the repository.

    Args:
        root: of the repository.
        command_line: also the page of options, which imports the package in a process of its own.
    """

    def read(path: str) -> str:
        return (root / path).read_text(encoding="utf-8")

    own = [path.relative_to(root).as_posix() for path in sorted((root / "docs").rglob("*.md"))]
    found = [Page(path.removeprefix("docs/"), path, read(path)) for path in own]
    for site, (title, wanted) in CONTRIBUTING.items():
        found.append(Page(site, "CONTRIBUTING.md", _sections(read("CONTRIBUTING.md"), title, wanted)))
    found.append(Page("develop/changelog.md", "CHANGELOG.md", read("CHANGELOG.md")))
    for path in sorted((root / "benchmarks" / "results").rglob("*.md")):
        name = path.parent.name if path.stem == "README" else path.stem
        source = path.relative_to(root).as_posix()
        found.append(Page(f"benchmarks/{name}.md", source, read(source)))
    for path in sorted((root / "nodes" / "web" / "docs").glob("*/en.md")):
        source = path.relative_to(root).as_posix()
        found.append(Page(f"nodes/{path.parent.name}.md", source, read(source)))
    found.append(Page("examples.md", "examples/README.md", _examples(root, read("examples/README.md"))))
    if command_line:
        found.append(Page("reference/command-line.md", "cli/__init__.py", _command_line(root)))
    return found


def _split(text: str) -> Iterator[tuple[str, str]]:
    """The sections of level 2 of a page, with their titles; what is before the first has the title ""."""
    title, lines, code = "", [], False
    for line in text.splitlines(keepends=True):
        code ^= line.startswith("```")
        if line.startswith("## ") and not code:
            yield title, "".join(lines)
            title, lines = line.removeprefix("## ").strip(), []
        lines.append(line)
    yield title, "".join(lines)


def _sections(text: str, title: str, wanted: tuple[str, ...]) -> str:
    found = dict(_split(text))
    missing = [name for name in wanted if name not in found]
    if missing:
        raise StageError(f"CONTRIBUTING.md has no section {', '.join(missing)}")
    listed = {name for _, names in CONTRIBUTING.values() for name in names}
    if left := [name for name in found if name and name not in listed]:
        raise StageError(f"CONTRIBUTING.md has a section that is on no page of the site: {', '.join(left)}")
    return f"# {title}\n\n" + "\n".join(found[name] for name in wanted)


def _examples(root: Path, start: str) -> str:
    """The README of the examples, and each script: its docstring as text, the rest as code."""
    parts = [start]
    for path in sorted((root / "examples").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        words = ast.get_docstring(ast.parse(text))
        if not words:
            raise StageError(f"{path} has no docstring that says what it shows")
        code = text.split('"""', 2)[2].strip()
        parts.append(f"## `{path.name}`\n\n{words}\n\n```python\n{code}\n```\n")
    return "\n".join(parts)


def _command_line(root: Path) -> str:
    command = [sys.executable, "-m", "typer", "vidaccel.cli", "utils", "docs", "--name", "vidaccel"]
    done = subprocess.run(command, cwd=root / "docs", capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise StageError(f"the options of the command line cannot be listed:\n{done.stderr}")
    return done.stdout.replace("# `vidaccel`", "# Commands and options", 1)


class Places:
    """Where in the site a file of the repository is.

    Args:
        found: the pages. root: of the repository. repository: address of the repository, where one is known.
    """

    def __init__(self, found: list[Page], root: Path, repository: str | None) -> None:
        self._root, self._repository = root, repository
        self._files = {page.source: page.site for page in found if page.source != "CONTRIBUTING.md"}
        self._files["CONTRIBUTING.md"] = next(iter(CONTRIBUTING))
        self._sections = {("README.md", anchor): site for anchor, site in README.items()}
        for page in found:
            if page.source == "CONTRIBUTING.md":
                for heading in re.findall(r"^#+ (.*)$", page.text, re.MULTILINE):
                    self._sections["CONTRIBUTING.md", f"#{anchor_of(heading)}"] = page.site
        self.pictures: set[str] = set()

    def target(self, page: Page, path: str, anchor: str) -> str | None:
        """What a link of `page` to a file becomes; None where it has no address.

        Raises:
            StageError: the file is not there.
        """
        if path == page.source:
            return anchor
        site = self._sections.get((path, anchor)) or self._files.get(path)
        if site is None and path.endswith(PICTURES) and (self._root / path).is_file():
            self.pictures.add(path)
            site = picture_place(path)
        if site is not None:
            anchor = "" if (path, anchor) in README.items() or path == "README.md" else anchor
            return posixpath.relpath(site, posixpath.dirname(page.site) or ".") + anchor
        if not (self._root / path).exists():
            raise StageError(f"{page.source} links to {path}, which is not there")
        return f"{self._repository}/blob/main/{path}{anchor}" if self._repository else None


def picture_place(path: str) -> str:
    """Where a picture of the repository is in the tree."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"pictures/{path.replace('/', '-')}"


def navigation(listed: list[Any], found: list[str]) -> list[Any]:
    """The menu with each pattern, such as `methods/*.md`, replaced by its pages that are not listed by name.

    Raises:
        StageError: a page is listed that is not there, or one that is there is not.
    """
    named = set(_named(listed))
    patterns = {name for name in named if name.endswith("*.md")}
    left = [name for name in sorted(found) if name not in named]
    matched = {p: [n for n in left if posixpath.dirname(n) == posixpath.dirname(p)] for p in patterns}
    problems = [f"{name} is in the menu, and no page" for name in sorted(named - patterns - set(found))]
    shown = {name for names in matched.values() for name in names}
    problems += [f"{name} is a page, and not in the menu" for name in left if name not in shown]
    if problems:
        raise StageError("docs/site/mkdocs.yml: " + "; ".join(problems))
    return _expanded(listed, matched)


def _named(listed: Any) -> Iterator[str]:
    if isinstance(listed, str):
        yield listed
    for entry in listed.values() if isinstance(listed, dict) else listed if isinstance(listed, list) else ():
        yield from _named(entry)


def _expanded(listed: Any, matched: dict[str, list[str]]) -> Any:
    if isinstance(listed, dict):
        return {title: _expanded(entry, matched) for title, entry in listed.items()}
    if isinstance(listed, list):
        return [
            part
            for entry in listed
            for part in (matched[entry] if _is_pattern(entry, matched) else [_expanded(entry, matched)])
        ]
    return listed


def _is_pattern(entry: Any, matched: dict[str, list[str]]) -> bool:
    return isinstance(entry, str) and entry in matched


def finished(root: Path = ROOT, command_line: bool = True) -> tuple[list[Page], dict[str, Any], set[str]]:
    """Pages with the links of the site, the settings of mkdocs, and the pictures that the pages show."""
    settings = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    found = pages(root, command_line)
    places = Places(found, root, settings.get("repo_url"))
    mapped = [
        replace(page, text=map_links(page.text, page.source, lambda *at, page=page: places.target(page, *at)))
        for page in found
    ]
    names = [page.site for page in found] + ([] if command_line else ["reference/command-line.md"])
    settings["nav"] = navigation(settings["nav"], names)
    return mapped, settings, places.pictures


def stage(build: Path) -> None:
    """Write the tree into a folder, `mkdocs.yml` and `docs/`, beside a folder from which the package can be read."""
    mapped, settings, pictures = finished()
    tree = build / "docs"
    shutil.rmtree(tree, ignore_errors=True)
    for page in mapped:
        (tree / page.site).parent.mkdir(parents=True, exist_ok=True)
        (tree / page.site).write_text(page.text, encoding="utf-8")
    for path in {*pictures, "docs/icon.png"}:
        (tree / picture_place(path)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, tree / picture_place(path))
    shutil.copyfile(ROOT / "docs" / "site" / "site.css", tree / "site.css")
    (build / "mkdocs.yml").write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    _package(build / "package")


def _package(folder: Path) -> None:
    """A folder with the code alone, by the name it is imported by: a checkout may have any, and holds much else."""
    shutil.rmtree(folder, ignore_errors=True)
    leave_out = shutil.ignore_patterns("__pycache__", "weights*", "web", "configs", "templates")
    for path in ROOT.glob("*/__init__.py"):
        shutil.copytree(path.parent, folder / "vidaccel" / path.parent.name, ignore=leave_out)
    shutil.copyfile(ROOT / "__init__.py", folder / "vidaccel" / "__init__.py")


if __name__ == "__main__":
    stage(ROOT / "build")
