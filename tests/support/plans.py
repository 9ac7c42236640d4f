"""Plans of every kind for the tests, each with the mask it must mean, made in a slow and obvious way."""

from __future__ import annotations

import torch

from vidaccel import LVSA, SLA, VSA, BlockPlan
from vidaccel.attention import Method, resolve_method


def untrained(name: str) -> Method:
    """A method by its name, without what it would have to be trained for, and sparse on a video of few frames."""
    special = {"sla": SLA(linear_scope="none"), "vsa": VSA(gated=False), "lvsa": LVSA(reference=2, window=0)}
    return special[name] if name in special else resolve_method(name)


def uniform(batch: int, heads: int, n_q: int, n_kv: int, block_q: int, block_k: int, share: float = 0.5):
    """A random block mask and its dense mask."""
    blocks = torch.rand(batch, heads, -(-n_q // block_q), -(-n_kv // block_k)) < share
    dense = blocks.repeat_interleave(block_q, 2)[:, :, :n_q].repeat_interleave(block_k, 3)[..., :n_kv]
    return BlockPlan.from_block_mask(blocks, block_q, block_k, n_q, n_kv), dense


def clusters(
    batch: int,
    heads: int,
    n_q: int,
    n_kv: int,
    c_q: int,
    c_k: int,
    share: float = 0.5,
    skew: float = 1.0,
    kv_heads: int | None = None,
):
    """Ragged clusters with orders of their own per head, some empty, and their dense mask.

    With `kv_heads`, groups of heads share the clusters of keys and one entry of their order.
    """
    q_labels, k_labels = (
        (torch.rand(batch, h, n) ** skew * c).long() for h, n, c in ((heads, n_q, c_q), (kv_heads or heads, n_kv, c_k))
    )
    selected = torch.rand(batch, heads, c_q, c_k) < share
    orders = [labels.argsort(stable=True, dim=-1) for labels in (q_labels, k_labels)]
    k_labels = k_labels.repeat_interleave(heads // k_labels.shape[1], 1)
    sizes = [
        torch.stack([torch.bincount(row, minlength=c) for row in labels.flatten(0, 1)]).view(batch, heads, c)
        for labels, c in ((q_labels, c_q), (k_labels, c_k))
    ]
    dense = torch.zeros(batch, heads, n_q, n_kv, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            dense[b, h] = selected[b, h][q_labels[b, h]][:, k_labels[b, h]]
    return BlockPlan.from_clusters(*sizes, selected, *orders), dense


def masked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float | None = None):
    """The definition in float64: output and log-sum-exp, 0 and -inf where a row has no key."""
    scores = q.double() @ k.double().transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    return weights @ v.double(), scores.logsumexp(-1)


# By name, for 2 heads of n tokens: a plan and its dense mask.
KINDS = {
    "uniform": lambda n: uniform(1, 2, n, n, 32, 32),
    "small blocks": lambda n: uniform(1, 2, n, n, 8, 5, share=0.3),
    "broadcast": lambda n: uniform(1, 1, n, n, 32, 32),
    "ragged": lambda n: clusters(1, 2, n, n, 5, 20),
    "skewed": lambda n: clusters(1, 2, n, n, 6, 20, skew=8.0),
    "all": lambda n: uniform(1, 1, n, n, 32, 32, share=1.1),
}
