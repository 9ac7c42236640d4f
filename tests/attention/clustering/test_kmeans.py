from __future__ import annotations

import pytest
import torch

from vidaccel.attention.clustering.kmeans import assign, cluster_sizes, kmeans, update
from vidaccel.attention.clustering.labels import sort_labels


def blobs(offset: float = 0.0, dtype: torch.dtype = torch.float32):
    """Twelve tight groups per head, far apart, and which token belongs to which."""
    centers = torch.randn(2, 3, 12, 16) * 10
    labels = torch.arange(240).remainder(12).expand(2, 3, 240)
    points = centers.gather(2, labels.unsqueeze(-1).expand(-1, -1, -1, 16)) + torch.randn(2, 3, 240, 16) * 0.05
    return (points + offset).to(dtype), labels


def inertia(points: torch.Tensor, centers: torch.Tensor) -> float:
    return torch.cdist(points, centers).min(-1).values.square().sum().item()


def test_assign_is_the_nearest_center():
    points, centers = torch.randn(2, 3, 100, 8), torch.randn(2, 3, 7, 8)
    assert assign(points, centers).equal(torch.cdist(points, centers).argmin(-1))


def test_update_is_the_mean_and_keeps_centers_that_lost_their_tokens():
    points, centers = torch.randn(1, 1, 10, 4), torch.randn(1, 1, 3, 4)
    labels = torch.tensor([0, 0, 0, 0, 2, 2, 2, 2, 2, 2]).view(1, 1, 10)
    new = update(points, labels, centers)
    torch.testing.assert_close(new[0, 0, 0], points[0, 0, :4].mean(0))
    torch.testing.assert_close(new[0, 0, 2], points[0, 0, 4:].mean(0))
    assert new[0, 0, 1].equal(centers[0, 0, 1])


@pytest.mark.parametrize("as_models_have_it", [False, True])
def test_sums_over_sorted_tokens_are_the_same_to_the_bit(as_models_have_it):
    points, centers = torch.randn(2, 50, 3, 8).transpose(1, 2), torch.randn(2, 3, 6, 8)
    if not as_models_have_it:
        points = points.contiguous()
    labels = torch.randint(4, (2, 3, 50)) + 1  # the first cluster and the last are empty
    order = sort_labels(labels, 6)[1]
    assert update(points, labels, centers, None, order).equal(update(points, labels, centers))


@pytest.mark.parametrize(("offset", "dtype"), [(0.0, torch.float32), (100.0, torch.float32), (30.0, torch.bfloat16)])
def test_groups_are_found_whatever_the_common_offset(offset, dtype):
    """A large mean is what breaks distances in low precision; removed, it must not matter."""
    points, truth = blobs(offset, dtype)
    # Start from one token of each group: the question here is the arithmetic, not the luck of the start.
    found = kmeans(points, 12, 5, points[:, :, :12].float())
    assert found.labels.equal(truth)


def test_iterations_lower_the_distance_and_warm_starts_keep_it():
    points = torch.randn(1, 2, 500, 8)
    once = kmeans(points, 10, 1).centroids
    often = kmeans(points, 10, 30).centroids
    warm = kmeans(points, 10, 2, often).centroids
    assert inertia(points, often) < 0.97 * inertia(points, once)
    assert inertia(points, warm) <= inertia(points, often) * 1.0001


def test_sizes_count_the_labels_with_empty_clusters():
    labels = torch.tensor([[[0, 0, 3, 3, 3]]])
    assert cluster_sizes(labels, 5).tolist() == [[[2, 0, 0, 3, 0]]]


@pytest.mark.parametrize(("clusters", "iterations"), [(0, 1), (11, 1), (3, 0)])
def test_bad_numbers_are_named(clusters, iterations):
    with pytest.raises(ValueError, match=f"clusters={clusters} and iterations={iterations}"):
        kmeans(torch.randn(1, 1, 10, 4), clusters, iterations)
