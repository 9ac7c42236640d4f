"""What the benchmark scripts share: where results go, who measured, and how a table is written."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def environment_line(device: str = "cpu") -> str:
    """Versions and hardware in one line."""
    import torch

    from vidaccel.generation.machine import environment

    return ", ".join(f"{name} {value}" for name, value in environment(torch.device(device)).items())


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A table, the columns those of its first row."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_markdown(path: Path, title: str, text: str, *tables: list[dict]) -> None:
    """A page of a text and tables, the columns those of each table's first row."""
    parts = [f"# {title}", text]
    for table in tables:
        columns = list(table[0])
        lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        lines += ["| " + " | ".join(str(row[c]) for c in columns) + " |" for row in table]
        parts.append("\n".join(lines))
    path.write_text("\n\n".join(parts) + "\n")
