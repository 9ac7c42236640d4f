"""Planning with the kernels, as on a GPU, against planning in torch: the same selections, stand-ins and outputs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from vidaccel import SVG, SVG2, Tangent, VideoLayout, sparse_attention
from vidaccel.attention import PlanMemory, clusters, kmeans, probe, runs
from vidaccel.attention.methods import svg

LAYOUT = VideoLayout(3, 6, 6, text_after=5)
METHODS = {
    "svg": SVG(density=0.8, tile=8, profile_rows=16),
    "svg2": SVG2(density=0.5, q_clusters=4, k_clusters=9, init_iterations=2),
    "svg2, compensated": SVG2(density=0.5, compensate=True, q_clusters=4, k_clusters=9, init_iterations=2),
    "tangent": Tangent(density=0.4, probe=True, q_clusters=4, k_clusters=9, init_iterations=2),
    "tangent, probe-free": Tangent(density=0.4, probe=False, q_clusters=4, k_clusters=9, init_iterations=2),
}


def tokens(device, seed):
    """Clustered tokens that move a little from step to step."""
    generator = torch.Generator().manual_seed(0)
    centers = 2 * torch.randn(3, 1, 2, 7, 32, generator=generator)
    picks = torch.randint(0, 7, (3, 1, 2, LAYOUT.tokens, 1), generator=generator).expand(-1, -1, -1, -1, 32)
    noise = torch.randn(picks.shape, generator=generator) + 0.2 * torch.randn(
        picks.shape, generator=torch.Generator().manual_seed(seed)
    )
    return (centers.gather(3, picks) + 0.4 * noise).to(device).unbind(0)


@pytest.mark.parametrize("name", METHODS)
def test_plans_are_those_of_torch(device, monkeypatch, name):
    method = METHODS[name]
    made = {}
    for with_kernels in (False, True):
        for module in (clusters, kmeans, probe, runs, svg):
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
