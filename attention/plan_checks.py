"""What a `BlockPlan` is held against: its shapes whenever one is made, and on request all that backends rely on."""

from __future__ import annotations

import torch


def check_shapes(
    n_q: int,
    n_kv: int,
    tiles: dict[str, torch.Tensor],
    runs: dict[str, torch.Tensor],
    q_order: torch.Tensor | None,
    kv_order: torch.Tensor | None,
) -> None:
    """Raise a `ValueError` where the parts of a plan do not fit one another; reads no numbers.

    Args:
        n_q, n_kv: queries and keys.
        tiles, runs: start and length by the names that they have in the plan.
        q_order, kv_order: of the plan.
    """
    if n_q < 1 or n_kv < 1:
        raise ValueError(f"BlockPlan needs at least one query and one key, got n_q={n_q}, n_kv={n_kv}.")
    (lead, lengths), (starts, run_lengths) = (tuple(x.shape for x in parts.values()) for parts in (tiles, runs))
    if len(lead) != 3 or lengths != lead:
        raise ValueError(f"BlockPlan tiles must both be [Bp, Hp, T], got {tuple(lead)} and {tuple(lengths)}.")
    if len(starts) != 4 or starts[:3] != lead or run_lengths != starts:
        raise ValueError(
            f"BlockPlan runs must both be [Bp, Hp, T, R] with the tiles' {tuple(lead)} in front, got "
            f"{tuple(starts)} and {tuple(run_lengths)}."
        )
    if 0 in starts:
        raise ValueError(
            f"BlockPlan runs must be [Bp, Hp, T, R] of at least 1 each, got {tuple(starts)}: a tile that reads nothing "
            "has one run of length 0."
        )
    for name, x in {**tiles, **runs}.items():
        if x.dtype != torch.int32:
            raise ValueError(f"BlockPlan.{name} must be int32, got {x.dtype}: cast it with .int().")
    for name, order, length in (("q_order", q_order, n_q), ("kv_order", kv_order, n_kv)):
        if order is not None and (order.ndim != 3 or order.shape[-1] != length or order.dtype != torch.int64):
            raise ValueError(
                f"BlockPlan.{name} must be int64 [1|B, 1|H, {length}], got {order.dtype} {tuple(order.shape)}."
            )
    batches = {"the tiles": lead[0]}
    batches |= {name: x.shape[0] for name, x in (("q_order", q_order), ("kv_order", kv_order)) if x is not None}
    heads = {"the tiles": lead[1]} | ({} if q_order is None else {"q_order": q_order.shape[1]})
    for axis, sizes in (("batch entries", batches), ("heads", heads)):
        if len(set(sizes.values()) - {1}) > 1:
            told = ", ".join(f"{name} for {size}" for name, size in sizes.items())
            raise ValueError(f"BlockPlan is for one number of {axis}, or 1 that holds for all, got {told}.")
    known = max(heads.values())
    if kv_order is not None and known > 1 and known % kv_order.shape[1]:
        raise ValueError(
            f"BlockPlan.kv_order is for {kv_order.shape[1]} heads or groups of them, which must divide the {known} "
            "heads of the tiles."
        )


def check_promises(
    n_q: int,
    n_kv: int,
    tiles: tuple[torch.Tensor, torch.Tensor],
    runs: tuple[torch.Tensor, torch.Tensor],
    q_order: torch.Tensor | None,
    kv_order: torch.Tensor | None,
) -> None:
    """Raise a `ValueError` where the numbers of a plan are not what its docstring promises; several host syncs.

    Args:
        n_q, n_kv: queries and keys.
        tiles, runs: start and length.
        q_order, kv_order: of the plan.
    """
    start, length = tiles
    ends = start + length
    covered = start[..., 0].eq(0).all() and ends[..., -1].eq(n_q).all()
    if not covered or (length < 0).any() or not (start[..., 1:] == ends[..., :-1]).all():
        raise ValueError("the tiles of this BlockPlan do not cover each query exactly once.")
    start, length = runs
    ends = start + length
    if (length < 0).any() or (start < 0).any() or (ends > n_kv).any():
        raise ValueError(f"a run of this BlockPlan leaves the {n_kv} keys.")
    read = torch.where(length > 0, ends, 0).cummax(-1).values  # up to where those so far reach; padding reads nothing
    if ((length > 0)[..., 1:] & (start[..., 1:] < read[..., :-1])).any():
        raise ValueError("two runs of one tile of this BlockPlan overlap, or do not ascend: sort them by their starts.")
    for name, order, tokens in (("q_order", q_order, n_q), ("kv_order", kv_order, n_kv)):
        if order is not None and not (order.sort(-1).values == torch.arange(tokens, device=order.device)).all():
            raise ValueError(f"BlockPlan.{name} is not a permutation of {tokens} tokens.")
