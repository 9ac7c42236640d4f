"""Tokens of all heads as rows of one matrix: a view where memory allows it, and the same rows where it does not."""

import pytest
import torch

from vidaccel.attention.clustering.kmeans import update
from vidaccel.attention.orders import permute
from vidaccel.attention.rows import token_rows


def layouts(batch: int, heads: int, tokens: int) -> dict[str, torch.Tensor]:
    """One tensor `[B, H, N, 8]`, in several orders of memory."""
    x = torch.randn(batch, heads, tokens, 8)
    return {
        "heads first": x,
        "tokens first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "neither": x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    }


@pytest.mark.parametrize("shape", [(1, 3, 5), (2, 3, 5), (2, 1, 5), (3, 4, 1)])
@pytest.mark.parametrize("memory", ["heads first", "tokens first", "neither"])
def test_a_token_is_the_row_that_it_is_said_to_be(shape, memory):
    x = layouts(*shape)[memory]
    rows, first, step = token_rows(x)
    assert torch.equal(rows[first + step * torch.arange(shape[2])], x)


def test_models_tokens_are_not_copied():
    x = layouts(2, 3, 5)["tokens first"]
    assert token_rows(x)[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("memory", ["tokens first", "neither"])
def test_permuting_and_means_do_not_depend_on_memory(memory):
    torch.manual_seed(0)
    made = layouts(2, 3, 40)
    order = torch.rand(2, 3, 40).argsort(-1)
    labels = torch.randint(0, 6, (2, 3, 40))
    centers = torch.randn(2, 3, 7, 8)  # the last has no tokens
    assert torch.equal(permute(made[memory], order), permute(made["heads first"], order))
    assert torch.equal(
        permute(made[memory], order), made["heads first"].gather(2, order.unsqueeze(-1).expand(2, 3, 40, 8))
    )
    assert torch.allclose(
        update(made[memory], labels, centers), update(made["heads first"], labels, centers), atol=1e-6
    )
    assert torch.equal(update(made[memory], labels, centers)[:, :, 6], centers[:, :, 6])
