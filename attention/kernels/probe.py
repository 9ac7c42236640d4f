"""What query centroids see of each key cluster: the probe of `Tangent` as Triton kernels, without a table of scores.

One program holds some centroids of a head against the keys of one cluster and keeps, with an online softmax over these
keys alone, the sum of the weights and the weighted means of keys and values: three products of length D a pair. Keys
and values are read where they lie, through the order of the clusters. All shapes depend on no value, and nothing is
read on the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import FUSED, LOG2E, Tiles, on_device, order_args, padded, rows_contiguous
from .runs import starts_of
from .walk import load_rows, token_rows

# By (16 bits, padded head_dim): centroids, keys, warps, stages. float32 is computed exactly, without tensor cores.
TILES = {
    (True, 64): Tiles(64, 64, 4, 2),
    (True, 128): Tiles(64, 64, 4, 2),
    (True, 256): Tiles(64, 32, 8, 1),
    (False, 64): Tiles(32, 32, 4, 1),
    (False, 128): Tiles(32, 32, 8, 1),
    (False, 256): Tiles(16, 16, 8, 1),
}


def probe_clusters(
    q_means: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    order: torch.Tensor,
    sizes: torch.Tensor,
    scale: float,
    room: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hold query centroids against every key, cluster by cluster.

    Args:
        q_means: `[B, H, Cq, D]`; rounded to the dtype of k.
        k, v: `[B, Hkv, N, D]`, any strides, H a multiple of Hkv.
        order: `[B, Hkv, N]` int64, the tokens of k sorted by cluster.
        sizes: `[B, Hkv, Ck]`, keys of each cluster; 0 is an empty one.
        scale: multiplies the scores.
        room: rows and columns of zeros behind the tables of keys and values.

    Returns:
        `log_mass`, the log of the sum of the exponentials of the scaled scores, and `bias`, that less the mean score
        under the softmax, both `[B, H, Cq, Ck]` float32 and -inf without keys; `key` and `value`, the means weighted by
        that softmax, `[B, H, Cq + room, Ck + room, D]` in the dtype of k, 0 without keys.
    """
    k, v = rows_contiguous(k), rows_contiguous(v)
    q_means = q_means.to(k.dtype).contiguous()
    first, sizes = starts_of(sizes)
    (batch, heads, centroids, dim), clusters = q_means.shape, sizes.shape[-1]
    shape = (batch, heads, centroids, clusters)
    log_mass, bias = (torch.empty(shape, dtype=torch.float32, device=k.device) for _ in range(2))
    wide = (batch, heads, centroids + room, clusters + room, dim)
    tables = torch.empty(2, *wide, dtype=k.dtype, device=k.device)
    if room:
        tables[:, :, :, centroids:] = 0
        tables[:, :, :, :, clusters:] = 0
    key, value = tables
    tiles = TILES[k.element_size() == 2, max(64, padded(dim))]
    block_m = min(tiles.block_m, padded(centroids))
    with on_device(k):
        # Programs of one cluster side by side: they read the same keys.
        _probe_kernel[(triton.cdiv(centroids, block_m) * clusters * batch * heads,)](
            q_means, k, v, log_mass, bias, key, value, first, sizes, *k.stride()[:3], *v.stride()[:3],
            *order_args(order, k.shape[1]), heads, heads // k.shape[1], centroids, clusters, room, scale * LOG2E,
            D=dim, D_PAD=padded(dim), BLOCK_M=block_m, BLOCK_N=tiles.block_n,
            **FUSED, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    return log_mass, bias, key, value


@triton.jit(do_not_specialize=["centroids", "clusters", "room"])
def _probe_kernel(
    q_ptr, k_ptr, v_ptr, mass_ptr, bias_ptr, key_ptr, value_ptr, first_ptr, size_ptr,
    k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, order_ptr, order_sb, order_sh,
    heads, group, centroids, clusters, room, qk_scale,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(centroids, BLOCK_M)
    at = (tl.program_id(0) // blocks).to(tl.int64)  # of the cluster, over all heads
    head = at // clusters
    b = head // heads
    h = head % heads
    rows = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_m = rows < centroids
    d = tl.arange(0, D_PAD)
    q = load_rows(q_ptr + head * centroids * D, rows, D, inside_m, d, D, D_PAD, True)
    kv_head = h // group
    k_ptr += b * k_sb + kv_head * k_sh
    v_ptr += b * v_sb + kv_head * v_sh
    of_keys = (b * (heads // group) + kv_head) * clusters + at % clusters
    order_ptr += b * order_sb + kv_head * order_sh + tl.load(first_ptr + of_keys)
    size = tl.load(size_ptr + of_keys)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    score = tl.zeros([BLOCK_M], tl.float32)
    key = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    value = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for start in range(0, size, BLOCK_N):
        members = start + tl.arange(0, BLOCK_N)
        inside = members < size
        tokens = token_rows(order_ptr, members, inside, True, True)
        k = load_rows(k_ptr, tokens, k_sn, inside, d, D, D_PAD, True)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_m = tl.maximum(m, tl.max(scores, 1))
        p = tl.exp2(scores - new_m[:, None])
        shrink = tl.exp2(m - new_m)
        v = load_rows(v_ptr, tokens, v_sn, inside, d, D, D_PAD, True)
        weights = p.to(k.dtype)
        key = tl.dot(weights, k, key * shrink[:, None], input_precision="ieee")
        value = tl.dot(weights, v, value * shrink[:, None], input_precision="ieee")
        total = total * shrink + tl.sum(p, 1)
        score = score * shrink + tl.sum(p * tl.where(inside[None, :], scores, 0.0), 1)
        m = new_m
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    mass = tl.where(total == 0.0, float("-inf"), m + tl.log2(tl.where(total == 0.0, 1.0, total)))
    place = (head * centroids + rows) * clusters + at % clusters
    tl.store(mass_ptr + place, mass * 0.6931471805599453, mask=inside_m)
    tl.store(bias_ptr + place, (mass - score * share) * 0.6931471805599453, mask=inside_m)
    place = (head * (centroids + room) + rows) * (clusters + room) + at % clusters
    at_rows = place[:, None] * D + d[None, :]
    inside_rows = inside_m[:, None] & (d < D)[None, :]
    tl.store(key_ptr + at_rows, (key * share[:, None]).to(key_ptr.dtype.element_ty), mask=inside_rows)
    tl.store(value_ptr + at_rows, (value * share[:, None]).to(value_ptr.dtype.element_ty), mask=inside_rows)


def read_outputs(log_mass: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the centroids' attention makes of a probe, in one pass over its values.

    Args:
        log_mass: `[B, H, Cq, Ck]` float32. value: `[B, H, Cq + room, Ck + room, D]`, of `probe_clusters`.

    Returns:
        `mass [B, H, Cq, Ck]`, the share of each cluster in a centroid's softmax; `outputs [B, H, Cq, D]`; `away [B, H,
        Cq, Ck]`, the squared distance of each cluster's value from the output. All float32.
    """
    batch, heads, centroids, clusters = log_mass.shape
    room, dim = value.shape[2] - centroids, value.shape[-1]
    mass, away = torch.empty_like(log_mass), torch.empty_like(log_mass)
    outputs = torch.empty(batch, heads, centroids, dim, dtype=torch.float32, device=value.device)
    with on_device(value):
        _read_kernel[(batch * heads * centroids,)](
            log_mass.contiguous(), value, mass, outputs, away, centroids, clusters, room,
            D=dim, D_PAD=padded(dim), WIDTH=triton.next_power_of_2(clusters), BLOCK=32, **FUSED, num_warps=4,
        )  # fmt: skip
    return mass, outputs, away


@triton.jit(do_not_specialize=["centroids", "clusters", "room"])
def _read_kernel(
    log_mass_ptr, value_ptr, mass_ptr, out_ptr, away_ptr, centroids, clusters, room,
    D: tl.constexpr, D_PAD: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    value_ptr += (row // centroids * (centroids + room) + row % centroids) * (clusters + room) * D
    log_mass_ptr += row * clusters
    every = tl.arange(0, WIDTH)
    known = tl.load(log_mass_ptr + every, mask=every < clusters, other=float("-inf"))
    top = tl.max(known, 0)
    total = tl.sum(tl.exp(known - top), 0)
    d = tl.arange(0, D_PAD)
    out = tl.zeros([D_PAD], tl.float32)
    for first in range(0, clusters, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < clusters
        share = tl.exp(tl.load(log_mass_ptr + at, mask=inside, other=float("-inf")) - top) / total
        tl.store(mass_ptr + row * clusters + at, share, mask=inside)
        value = load_rows(value_ptr, at, D, inside, d, D, D_PAD, True).to(tl.float32)
        out += tl.sum(share[:, None] * value, 0)
    tl.store(out_ptr + row * D + d, out, mask=d < D)
    for first in range(0, clusters, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < clusters
        apart = load_rows(value_ptr, at, D, inside, d, D, D_PAD, True).to(tl.float32) - out[None, :]
        tl.store(away_ptr + row * clusters + at, tl.sum(apart * apart, 1), mask=inside)
