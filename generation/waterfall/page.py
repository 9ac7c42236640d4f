"""A waterfall for a reader: a page in one file, and its numbers as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..media.video import contact_sheet, data_url, png
from ..report.figures import figure_svg, waterfall_chart
from ..report.page import format_psnr, format_seconds, template, write_numbers, write_text
from .account import Row, Waterfall


def row_name(row: Row, number: int) -> str:
    """What a row is called: the base, or the lever that it adds."""
    return f"+ {row.stage.name}" if number else row.stage.name


def row_notes(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The notes of each row with its name, without those of the rows above it: its levers have them too."""
    found: dict[str, str] = {}
    for number, row in enumerate(rows):
        for note in row.notes:
            found.setdefault(note, row_name(row, number))
    return [(name, note) for note, name in found.items()]


def write_waterfall(made: Waterfall, page: Path, command: str = "vidaccel.waterfall(...)") -> Path:
    """Write the page of a waterfall, and its numbers beside it (.json); files that are there are replaced.

    Args:
        made: to be shown.
        page: the .html file.
        command: that makes it again.
    """
    import yaml

    write_numbers(made.to_dict(), page.with_suffix(".json"))
    names = [row_name(row, number) for number, row in enumerate(made.rows)]
    bars = {name: (row.median, *row.spread) for name, row in zip(names, made.rows, strict=True)}
    told = [_told(made, row, number) for number, row in enumerate(made.rows)]
    shape = made.rows[0].sample.shape[1:]
    frames = min(len(row.sample) for row in made.rows)
    samples = {n: row.sample[:frames] for n, row in zip(names, made.rows, strict=True) if row.sample.shape[1:] == shape}
    html = template("waterfall.html.j2").render(
        w=made,
        chart=figure_svg(waterfall_chart(bars, told), "waterfall"),
        sheet=data_url(png(contact_sheet(samples)), "image/png"),
        checked=made.rows[0].right is not None,
        other_model=any(row.stage.name == "model" for row in made.rows),
        notes=row_notes(made.rows),
        command=command,
        yaml=yaml.safe_dump(made.preset.to_dict(), sort_keys=False, allow_unicode=True),
    )
    return write_text(html, page)


def _told(made: Waterfall, row: Row, number: int) -> str:
    parts = [format_seconds(row.median)]
    if number:
        parts.append(f"{made.gain(row):.2f}×" if made.differs(row) else "no difference")
    if row.right is not None:
        parts.append(f"{sum(row.right)}/{len(row.right)} right")
    elif number:
        parts.append(format_psnr(row.mean_psnr, row.identical_frames))
    return " · ".join(parts)
