"""The tables of `docs/composition.md` are those of the tests: `python tests/packaging/test_composition_docs.py` writes
them."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "composition.md"
sys.path.insert(0, str(ROOT / "tests" / "support"))

from composition import LEVERS, read  # noqa: E402 - the page is written without pytest, too
from doc_tables import filled  # noqa: E402


def tables() -> dict[str, str]:
    data = read()
    texts: dict[str, int] = {}

    def word(outcome: str) -> str:
        kind, _, text = outcome.partition(": ")
        if kind == "absent":
            return "–"
        return f"{kind} [{texts.setdefault(text, len(texts) + 1)}]" if text else kind

    def cell(outcome: str | dict[str, str]) -> str:
        if isinstance(outcome, str):
            return word(outcome)
        return "; ".join(f"{order.split()[0]}: {word(text)}" for order, text in outcome.items())

    lines = ["| family | " + " | ".join(LEVERS) + " |", "| --- |" + " --- |" * len(LEVERS)]
    for family, row in data["cells"].items():
        lines.append(f"| {family} | " + " | ".join(cell(row[lever]) for lever in LEVERS) + " |")
    lines += ["", *(f"{number}. `{text}`" for text, number in texts.items())]
    levers = []
    for lever in LEVERS.values():
        version = f" (with {lever.package} {data['versions'][lever.package]})" if lever.package else ""
        levers.append(f"- {lever.name}: {lever.what}{version}")
    return {"levers": "\n".join(levers), "cells": "\n".join(lines)}


def test_the_page_has_the_tables_of_the_tests():
    page = PAGE.read_text()
    assert filled(page, tables()) == page and len(page.splitlines()) > 60


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(), tables()))
