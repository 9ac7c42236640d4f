"""Planning with the kernels, as on a GPU, against planning in torch: the same selections, stand-ins and outputs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from planned_calls import LAYOUT, METHODS, tokens

from vidaccel import sparse_attention
from vidaccel.attention import PlanMemory, runs
from vidaccel.attention.clustering import clusters, kmeans, probe, spread
from vidaccel.attention.methods import svg


@pytest.mark.parametrize("name", METHODS)
def test_plans_are_those_of_torch(device, monkeypatch, name):
    method = METHODS[name]
    made = {}
    for with_kernels in (False, True):
        for module in (clusters, kmeans, probe, runs, spread, svg):
            monkeypatch.setattr(module, "use_kernels", lambda x, use=with_kernels: use)
        memory = PlanMemory()
        made[with_kernels] = []
        for step in range(3):
            q, k, v = tokens(device, step + 1)
            plan = method.plan(q, k, v, LAYOUT, memory)
            made[with_kernels].append((plan, sparse_attention(q, k, v, plan, backend="reference")))
    for (ours, out), (theirs, expected) in zip(made[True], made[False], strict=True):
        assert ours.pairs().equal(theirs.pairs())
        if ours.selection is not None:
            assert ours.selection[0].equal(theirs.selection[0]) and ours.selection[1].equal(theirs.selection[1])
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)
        if "predicted_error" in theirs.details:
            torch.testing.assert_close(
                ours.details["predicted_error"], theirs.details["predicted_error"], rtol=1e-3, atol=0
            )
