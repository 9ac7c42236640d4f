"""What the nodes start with, against what the methods have in Python and on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from vidaccel import VideoLayout
from vidaccel.attention import METHODS as IN_PYTHON
from vidaccel.nodes.defaults import DENSITY, defaults_of
from vidaccel.nodes.pipeline.acceleration import METHODS, Acceleration

PAGES = Path(__file__).parents[2] / "nodes" / "web" / "docs"


def test_accelerate_pipeline_starts_with_the_method_that_python_takes():
    default = Acceleration()
    assert default.method_for(VideoLayout(21, 30, 52)) == IN_PYTHON[default.method]()


@pytest.mark.parametrize("name", [name for name in METHODS if name != "vsa"])  # which is for pipelines alone
def test_the_values_are_those_of_the_method_and_its_page_says_so(name):
    method, found = IN_PYTHON[name](), defaults_of(IN_PYTHON[name])
    assert (found.start, found.end, found.layers) == (
        method.schedule.first_steps,
        method.schedule.last_steps,
        method.schedule.first_layers,
    )
    assert found.own_density == (getattr(method, "density", None) is not None)
    assert found.density == (method.density if found.own_density else DENSITY)
    title = {"tangent": "Tangent", "radial": "Radial", "sparge": "Sparge"}.get(name, name.upper())
    page = (PAGES / f"VidaccelSparseAttention{title}" / "en.md").read_text(encoding="utf-8")
    assert (f"The method has none of its own; the node starts with {DENSITY:g}." in page) != found.own_density
