"""The probe kernel against the probe in torch, in float64 where it is the definition."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from vidaccel.attention.kernels.probe import probe_clusters


def written_out(q_means, k, v, order, sizes, scale):
    """Cluster by cluster in float64."""
    q_means, k, v = q_means.double(), k.double(), v.double()
    batch, heads, centroids, dim = q_means.shape
    shape = (batch, heads, centroids, sizes.shape[-1])
    mass, bias = (torch.full(shape, -torch.inf, dtype=torch.float64, device=k.device) for _ in range(2))
    key, value = (torch.zeros(*shape, dim, dtype=torch.float64, device=k.device) for _ in range(2))
    for b in range(batch):
        for h in range(heads):
            for j, members in enumerate(order[b, h].split(sizes[b, h].tolist())):
                if members.numel() == 0:
                    continue
                scores = q_means[b, h] @ k[b, h, members].T * scale
                weights = scores.softmax(-1)
                mass[b, h, :, j] = scores.logsumexp(-1)
                bias[b, h, :, j] = mass[b, h, :, j] - (weights * scores).sum(-1)
                key[b, h, :, j], value[b, h, :, j] = weights @ k[b, h, members], weights @ v[b, h, members]
    return mass, bias, key, value


@pytest.mark.parametrize(
    ("dim", "dtype", "tolerance"),
    [
        (64, torch.float32, 2e-5),
        (96, torch.float32, 2e-5),
        (128, torch.float16, 4e-3),
        pytest.param(128, torch.bfloat16, 3e-2, marks=pytest.mark.gpu),
        pytest.param(64, torch.bfloat16, 3e-2, marks=pytest.mark.gpu),
        pytest.param(256, torch.bfloat16, 3e-2, marks=pytest.mark.gpu),
    ],
)
def test_equals_the_definition(device, dim, dtype, tolerance):
    n, centroids, clusters = (3000, 150, 40) if device.type == "cuda" else (150, 21, 7)
    k, v = (torch.randn(1, n, 2, dim).to(device, dtype).transpose(1, 2) for _ in range(2))
    q_means = torch.randn(1, 2, centroids, dim).to(device, dtype)
    labels = (torch.rand(1, 2, n) ** 2 * (clusters - 1)).long()  # uneven, and the last cluster is empty
    labels[labels == 2] = 3
    sizes = torch.stack([torch.bincount(x, minlength=clusters) for x in labels[0]])[None].to(device)
    order = labels.argsort(stable=True, dim=-1).to(device)
    scale = dim**-0.5
    found = probe_clusters(q_means, k, v, order, sizes, scale)
    expected = written_out(q_means, k, v, order, sizes, scale)
    for name, ours, theirs in zip(("log_mass", "bias", "key", "value"), found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
