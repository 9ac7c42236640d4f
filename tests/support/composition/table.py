"""The table that is expected, as a file."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from .cells import FAMILY_BUILDS, compute
from .levers import LEVERS

FILE = Path(__file__).parents[2] / "data" / "composition.json"


def read() -> dict[str, Any]:
    """`{"versions": {package: version}, "cells": {family: {lever: outcome, or an outcome for each order}}}`."""
    return json.loads(FILE.read_text())


def write() -> None:
    """Compute every cell; those of packages that are not installed stay as they are."""
    old = read() if FILE.exists() else {"versions": {}, "cells": {}}
    versions = dict(old["versions"])
    cells: dict[str, dict[str, Any]] = {family: dict(old["cells"].get(family, {})) for family in FAMILY_BUILDS}
    for lever in LEVERS.values():
        if not lever.installed:
            continue
        if lever.package:
            versions[lever.package] = importlib.metadata.version(lever.package)
        for family in FAMILY_BUILDS:
            cells[family][lever.name] = compute(family, lever)
    cells = {family: {name: row[name] for name in LEVERS if name in row} for family, row in cells.items()}
    FILE.write_text(json.dumps({"versions": versions, "cells": cells}, indent=1) + "\n")
