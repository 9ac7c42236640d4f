"""The k-means kernels against plain torch: the same labels but for ties, the same means."""

from __future__ import annotations

import pytest
import torch

from vidaccel.attention.clustering import kmeans as reference
from vidaccel.attention.kernels import kmeans as kernels

DTYPES = [torch.float32, torch.float16]


def tokens(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Clustered tokens with a mean that is large next to their distances, as keys have."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(*shape[:2], 7, shape[3], generator=generator)
    picks = torch.randint(0, 7, shape[:3], generator=generator).unsqueeze(-1).expand(shape)
    noise = 0.3 * torch.randn(shape, generator=generator)
    return (centers.gather(2, picks) + noise + 4.0).to(device, dtype)


def update(x: torch.Tensor, mean: torch.Tensor, labels: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """What the kernels make of `kmeans.update`."""
    order, sizes = kernels.in_clusters(labels, centers.shape[2])
    return kernels.means_of(x, mean, order, sizes, centers + mean) - mean


def assign(x: torch.Tensor, mean: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """What the kernel makes of `kmeans.assign`."""
    labels = kernels.assign(x, mean, centers + mean)
    assert labels.dtype == torch.int16
    return labels.long()


def start_of(x: torch.Tensor, clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean, and centers relative to it that the dtype of x can hold, to which the kernel rounds."""
    mean = x.mean(2, keepdim=True, dtype=torch.float32)
    picks = torch.linspace(0, x.shape[2] - 1, clusters, device=x.device).round().long()
    return mean, (x[:, :, picks].float() - mean).to(x.dtype).float()


def check_labels(x: torch.Tensor, mean: torch.Tensor, centers: torch.Tensor, got: torch.Tensor, slack: float) -> None:
    """Each label is a nearest centroid, or one whose distance is the same to within `slack` of the score's scale."""
    points = x.double() - mean.double()
    scores = points @ centers.double().transpose(-1, -2) - centers.double().square().sum(-1).unsqueeze(-2) / 2
    short = scores.amax(-1) - scores.gather(-1, got.unsqueeze(-1)).squeeze(-1)
    assert short.max() <= slack * scores.abs().amax()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "clusters", "d"), [(200, 9, 64), (130, 70, 96), (64, 1, 128), (33, 33, 16)])
def test_assignment(device, dtype, n, clusters, d):
    x = tokens((2, 2, n, d), dtype, device)
    mean, centers = start_of(x, clusters)
    labels = assign(x, mean, centers)
    check_labels(x, mean, centers, labels, 1e-5 if dtype == torch.float32 else 2e-3)
    assert (labels != reference.assign(x.float() - mean, centers)).float().mean() <= 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "clusters", "d"), [(300, 9, 64), (130, 70, 96), (512, 3, 40)])
def test_update(device, dtype, n, clusters, d):
    x = tokens((1, 2, n, d), dtype, device)
    mean, centers = start_of(x, clusters)
    labels = torch.randint(0, max(1, clusters - 2), (1, 2, n), device=device)  # the last clusters are empty
    got = update(x, mean, labels, centers)
    expected = reference.update(x.double() - mean, labels, centers.double())
    torch.testing.assert_close(got.double(), expected, atol=3e-6, rtol=1e-5)
    if clusters > 2:
        torch.testing.assert_close(got[:, :, -2:], centers[:, :, -2:], atol=2e-6, rtol=0)


def test_tokens_sorted_by_cluster(device):
    labels = torch.randint(0, 6, (1, 2, 300), device=device)
    order, sizes = kernels.in_clusters(labels, 8)
    assert sizes.equal(reference.cluster_sizes(labels, 8)) and order.equal(labels.argsort(stable=True, dim=-1))


def test_one_giant_cluster_is_summed_in_pieces(device):
    x = tokens((1, 1, 512, 64), torch.float32, device)
    mean, centers = start_of(x, 4)
    labels = torch.zeros(1, 1, 512, dtype=torch.int64, device=device)
    labels[..., 5] = 3
    got = update(x, mean, labels, centers)
    expected = reference.update(x.double() - mean, labels, centers.double())
    torch.testing.assert_close(got.double(), expected, atol=3e-6, rtol=1e-5)
    assert update(x, mean, labels, centers).equal(got)


def test_strided_tokens_need_no_copy(device):
    x = tokens((2, 2, 100, 64), torch.float32, device)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)  # [B, N, H, D] in memory
    mean, centers = start_of(x, 8)
    labels = assign(strided, mean, centers)
    assert labels.equal(assign(x, mean, centers))
    assert update(strided, mean, labels, centers).equal(update(x, mean, labels, centers))


def test_identical_tokens_all_take_the_first_of_equal_centroids(device):
    x = torch.ones(1, 1, 50, 32, device=device)
    mean, centers = start_of(x, 5)
    assert assign(x, mean, centers).eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_kmeans_is_that_of_torch(device, dtype):
    x = tokens((1, 2, 240, 64), dtype, device)
    ours = reference.kmeans(x, 7, 6, implementation="triton")
    theirs = reference.kmeans(x, 7, 6, implementation="torch")
    # The kernel rounds centers to the dtype of the tokens, so a token between two may go to the other one: what counts
    # is how near the tokens are to their centers.
    spread = [
        (x.float() - means.gather(2, labels.long().unsqueeze(-1).expand(x.shape))).square().mean()
        for labels, means, *_ in (ours, theirs)
    ]
    assert (ours[0] != theirs[0]).float().mean() <= 0.02 and abs(spread[0] / spread[1] - 1) < 0.01
    warm = reference.kmeans(x, 7, 1, ours[1], implementation="triton")
    assert (warm[0] == ours[0]).float().mean() > 0.98


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="choose auto, torch or triton"):
        reference.kmeans(torch.randn(1, 1, 8, 16), 2, 1, implementation="numpy")


@pytest.mark.gpu
@pytest.mark.parametrize("clusters", [100, 500])
def test_at_the_size_of_a_large_model(clusters):
    x = tokens((1, 40, 75_600, 128), torch.bfloat16, torch.device("cuda"))
    mean, centers = start_of(x, clusters)
    labels = assign(x, mean, centers)
    check_labels(x[:, :2], mean[:, :2], centers[:, :2], labels[:, :2], 2e-3)
    expected = reference.update(x[:, :2].double() - mean[:, :2], labels[:, :2], centers[:, :2].double())
    torch.testing.assert_close(update(x, mean, labels, centers)[:, :2].double(), expected, atol=1e-4, rtol=1e-4)
