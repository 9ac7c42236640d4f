"""`benchmarks/kernels.py`, of which no GPU is needed here: what it keeps when it is stopped, and what it builds."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from benchmark_scripts import imported

from vidaccel.attention import METHODS


@pytest.fixture(scope="module")
def kernels():
    with imported("kernels") as module:
        yield module


class Stopped(Exception):
    """What a limit of time does to the script."""


def test_a_call_that_was_stopped_has_written_what_it_measured_and_is_gone_on_with(kernels, tmp_path, monkeypatch):
    measured, stop = [], True

    class Bench:
        def __init__(self, *_):
            pass

        def forward(self):
            measured.append("forward")
            yield {"plan": "radial", "ms": len(measured)}

        def passes(self):
            measured.append("passes")
            if stop:
                raise Stopped
            yield {"pass": "walk", "ms": 0.1}

    monkeypatch.setattr(kernels, "Bench", Bench)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.6"))
    work = ["kernels.py", "--shape", "toy", "--device", "cpu", "--parts", "forward", "passes", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", work)
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        with pytest.raises(Stopped):
            kernels.main()
        page, rows = tmp_path / "kernels-interpreter-toy.md", tmp_path / "kernels-interpreter-toy.json"
        assert json.loads(rows.read_text())["forward"] == [{"plan": "radial", "ms": 1}]
        assert "| radial | 1 |" in page.read_text() and page.read_text().endswith("Not measured yet: passes.\n")
        stop = False
        kernels.main()
        assert measured == ["forward", "passes", "passes"]
        text = page.read_text()
        assert "| radial | 1 |" in text and "| walk | 0.1 |" in text and "Not measured" not in text
        assert {name.name for name in tmp_path.iterdir()} == {page.name, rows.name}
        kernels.main()  # that one came to its end: a kernel may have changed since
        assert measured == ["forward", "passes", "passes", "forward", "passes"]


def test_a_method_is_built_when_it_is_wanted_and_once(kernels, monkeypatch):
    built = []
    for name in kernels.DENSITIES:
        of = METHODS[name].for_density
        monkeypatch.setattr(METHODS[name], "for_density", lambda *a, of=of, name=name: built.append(name) or of(*a))
    options = Namespace(repeats=1, density=0.8, chosen=True, device="cpu", dtype="float32")
    bench = kernels.Bench(kernels.SHAPES["toy"], options)
    assert built == []
    assert bench.method("svg2") is bench.method("svg2") and built == ["svg2"]
