"""How many kernels a steady call launches: each costs microseconds that a GPU stands still in small models."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from fast_set import fast
from planned_calls import LAYOUT, METHODS, tokens

from vidaccel import Radial
from vidaccel.attention import PlanMemory, runs
from vidaccel.attention import plan as plans
from vidaccel.attention.backends.triton import TritonBackend
from vidaccel.attention.clustering import clusters, kmeans, probe, slopes, spread
from vidaccel.attention.functional import attend
from vidaccel.attention.methods import svg

# As counted with text in the sequence, and of video alone, and a few for a version of torch that splits an operator.
MOST = {
    "radial": (2, 2),
    "svg": (34, 34),
    "svg2": (62, 58),
    "svg2, compensated": (80, 77),
    "tangent": (88, 75),
    "tangent, probe-free": (97, 86),
}


@pytest.mark.parametrize("name", fast({"radial", "svg", "tangent"}, MOST))
@pytest.mark.parametrize("alone", [False, True], ids=["text", "video alone"])
def test_launches_of_a_steady_call(device, monkeypatch, name, alone):
    if device.type != "cpu":
        pytest.skip("counted in the interpreter")
    from launches import Launches

    for module in (clusters, kmeans, probe, runs, slopes, spread, svg):
        monkeypatch.setattr(module, "use_kernels", lambda x: True)
    # On a GPU sizes are not checked, since that would wait for it.
    monkeypatch.setattr(plans, "_sequence_length", lambda name, given, order, sizes: given or order.shape[-1])
    method = METHODS.get(name) or Radial(8)
    memory = PlanMemory()
    layout = replace(LAYOUT, text_after=0) if alone else LAYOUT
    worst = {}
    for step in range(4):  # re-clustering is in some steps and not in others
        q, k, v = (x[:, :, : layout.tokens].half() for x in tokens(device, step + 1))  # of float32, a cast is none
        with Launches() as launches:
            plan = method.plan(q, k, v, layout, memory)
            attend(TritonBackend(), q, k, v, plan, 0.1)
        if step:
            worst = max(worst, launches.counts, key=lambda counts: sum(counts.values()))
    assert sum(worst.values()) <= MOST[name][alone], worst
