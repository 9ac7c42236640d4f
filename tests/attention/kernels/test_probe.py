"""The probe kernel against the probe in torch, in float64 where it is the definition."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from vidaccel.attention.kernels.probe import probe_clusters, read_outputs


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
    found = probe_clusters(q_means, k, v, order, sizes, scale, room=1)
    expected = written_out(q_means, k, v, order, sizes, scale)
    assert not found[2][:, :, -1].any() and not found[3][:, :, :, -1].any()
    found = [*found[:2], *(table[:, :, :-1, :-1] for table in found[2:])]
    for name, ours, theirs in zip(("log_mass", "bias", "key", "value"), found, expected, strict=True):
        torch.testing.assert_close(
            ours.double(), theirs, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("room", [0, 1])
def test_what_the_centroids_make_of_it(device, room):
    log_mass = 3 * torch.randn(2, 2, 9, 37, device=device)
    log_mass[:, :, :, 5] = -torch.inf
    value = torch.randn(2, 2, 9 + room, 37 + room, 40, device=device)
    mass, outputs, away = read_outputs(log_mass, value)
    value = value[:, :, :9, :37].double()
    share = log_mass.double().softmax(-1)
    expected = (share.unsqueeze(-2) @ value).squeeze(-2)
    torch.testing.assert_close(mass.double(), share, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(outputs.double(), expected, atol=1e-5, rtol=1e-5)
    apart = (value - expected.unsqueeze(-2)).square().sum(-1)
    torch.testing.assert_close(away.double(), apart, atol=1e-4, rtol=1e-5)
