"""The tables of `docs/families.md` are those of the code: `python tests/packaging/test_family_docs.py` writes them."""

from __future__ import annotations

import sys
from pathlib import Path

from vidaccel.pipelines.acceleration.families import NOT_SERVED
from vidaccel.pipelines.acceleration.support import support_rows

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "families.md"
sys.path.insert(0, str(ROOT / "tests" / "support"))

from doc_tables import filled  # noqa: E402 - the page is written without pytest, too


def tables() -> dict[str, str]:
    rows = support_rows()
    lines = ["| " + " | ".join(rows[0]) + " |", "| " + " | ".join("---" for _ in rows[0]) + " |"]
    lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
    return {
        "families": "\n".join(lines),
        "not-served": "\n".join(f"- `{name}`: {why}." for name, why in NOT_SERVED.items()),
    }


def test_the_page_has_the_tables_of_the_code():
    page = PAGE.read_text()
    assert filled(page, tables()) == page and len(page.splitlines()) > 30


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(), tables()))
