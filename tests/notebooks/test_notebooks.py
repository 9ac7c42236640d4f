"""The notebooks run from top to bottom."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_cell_runs(path, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    lines = []
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], f"cell {number} was saved with its output: clear it"
            lines += [f"# cell {number}", "".join(cell["source"])]
    script = tmp_path / f"{path.stem}.py"
    script.write_text("\n".join(lines), encoding="utf-8")
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed
    densities = [int(share) for share in re.findall(r"(\d+)% of the pairs", printed)]
    assert all(share < 100 for share in densities)  # what is shown as sparse is
    assert len(densities) == (2 if path.stem == "training" else 0)
