"""The tables of `docs/families.md` are those of the code: `python tests/packaging/test_family_docs.py` writes them."""

from __future__ import annotations

import re
from pathlib import Path

from vidaccel.pipelines.acceleration.families import NOT_SERVED, support_rows

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def tables() -> dict[str, str]:
    rows = support_rows()
    lines = ["| " + " | ".join(rows[0]) + " |", "| " + " | ".join("---" for _ in rows[0]) + " |"]
    lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
    return {
        "families": "\n".join(lines),
        "not-served": "\n".join(f"- `{name}`: {why}." for name, why in NOT_SERVED.items()),
    }


def filled(page: str) -> str:
    for name, table in tables().items():
        page = re.sub(
            f"<!-- {name} -->.*?<!-- /{name} -->", f"<!-- {name} -->\n{table}\n<!-- /{name} -->", page, flags=re.DOTALL
        )
    return page


def test_the_page_has_the_tables_of_the_code():
    page = PAGE.read_text()
    assert filled(page) == page and len(page.splitlines()) > 30


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
