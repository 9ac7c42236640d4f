"""Tables of a page that are cut from the committed ones of `benchmarks/results/`: no number is written by hand.

`python docs/site/tables.py` writes them into the pages of `docs/`, each below a comment that readers do not see:

    <!-- table
    file: benchmarks/results/quality.csv
    where: {method: ["svg2", "svg2, compensated"], dense: "20%"}
    columns: {method: method, wanted: density, all right: right}
    percent: [all right]
    -->
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

DIRECTIVE = re.compile(r"(<!-- table\n((?:.*\n)*?)-->\n)(\n(?:\|.*\n)+)?")
"""A comment, what it says, and the table below it."""
ROOT = Path(__file__).resolve().parents[2]


class TableError(ValueError):
    """A directive that asks for what its file does not have."""


def fill(text: str, root: Path, page: str) -> str:
    """A page with the tables that its comments ask for, each below its comment in the place of what is there.

    Args:
        text: Markdown. root: of the repository. page: its name, for errors.

    Raises:
        TableError: a directive that cannot be read, or whose file, column or value is not there.
    """
    return DIRECTIVE.sub(lambda match: f"{match[1]}\n{table(yaml.safe_load(match[2]), root, page)}\n", text)


def table(wanted: Mapping[str, Any], root: Path, page: str) -> str:
    """The rows of a CSV file where each column of `where` has one of its values, as a Markdown table."""
    unknown = set(wanted) - {"file", "where", "columns", "percent"}
    if unknown or not {"file", "columns"} <= set(wanted):
        raise TableError(f"{page}: a table has file and columns, and may have where and percent: {dict(wanted)}")
    with (root / wanted["file"]).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    where = {name: [str(v) for v in _listed(values)] for name, values in wanted.get("where", {}).items()}
    columns, percent = wanted["columns"], wanted.get("percent", [])
    for name in {*where, *columns, *percent} - set(rows[0]):
        raise TableError(f"{page}: {wanted['file']} has no column {name!r}; it has {', '.join(rows[0])}")
    for name, values in where.items():
        for value in set(values) - {row[name] for row in rows}:
            raise TableError(f"{page}: no row of {wanted['file']} has {value!r} as its {name}")
    chosen = [row for row in rows if all(row[name] in values for name, values in where.items())]
    if not chosen:
        raise TableError(f"{page}: no row of {wanted['file']} fits {where}")
    lines = [columns.values(), ["---"] * len(columns)]
    lines += [[_cell(row[name], name in percent) for name in columns] for row in chosen]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def stale(root: Path = ROOT) -> dict[Path, str]:
    """The pages of `docs/` whose tables are not those of the results, and what they should be."""
    found = {}
    for path in sorted((root / "docs").rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        if (filled := fill(text, root, path.relative_to(root).as_posix())) != text:
            found[path] = filled
    return found


def _listed(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [values]


def _cell(value: str, percent: bool) -> str:
    return f"{float(value):.0%}".replace("%", "\N{NO-BREAK SPACE}%") if percent and value else value or "–"


if __name__ == "__main__":
    for page, filled in stale().items():
        page.write_text(filled, encoding="utf-8")
        print(page)
