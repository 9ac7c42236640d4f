"""The rows that SVG profiles, under both masks at once: against masked attention in float64."""

from __future__ import annotations

import pytest
import torch
from plans import masked_attention

pytest.importorskip("triton")

from vidaccel.attention.kernels import profile


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("rows", "dim"), [(32, 64), (5, 40)])
def test_full_and_masked_rows(device, monkeypatch, dtype, rows, dim):
    n = 9000 if device.type == "cuda" else 150
    if device.type == "cpu":
        monkeypatch.setattr(profile, "SPLIT", 64)
    k, v = (torch.randn(2, n, 3, dim).to(device, dtype).transpose(1, 2) for _ in range(2))
    q = 3 * torch.randn(2, 3, rows, dim).to(device, dtype)
    masks = torch.rand(2, rows, n, device=device) < 0.3
    masks[1, 0] = False  # a row without keys
    full, masked = profile.attend_rows(q, k, v, masks, 0.1)
    tolerance = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    everything = torch.ones_like(masks[0])
    for ours, mask in ((full, everything), (masked[:, :, 0], masks[0]), (masked[:, :, 1], masks[1])):
        expected, _ = masked_attention(q, k, v, mask, 0.1)
        torch.testing.assert_close(ours.double(), expected, atol=tolerance, rtol=tolerance)
