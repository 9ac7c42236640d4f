"""`sparse_attention`: attention from a plan, without a model around it."""

from __future__ import annotations

from typing import Literal, overload

import torch

from .backends import Backend, Request, pick, pick_special
from .backends.base import AS_INPUTS, SMALL_TILE, Precision
from .clustering.slopes import follow
from .compensate import attend_skipped
from .gradients import transform_of, wants_gradient
from .merge import merge
from .plan import BlockPlan


@overload
def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    *,
    backend: str = "auto",
    scale: float | None = None,
    return_lse: Literal[False] = False,
    qk: str | None = None,
    pv: str | None = None,
) -> torch.Tensor: ...


@overload
def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    *,
    backend: str = "auto",
    scale: float | None = None,
    return_lse: Literal[True],
    qk: str | None = None,
    pv: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    *,
    backend: str = "auto",
    scale: float | None = None,
    return_lse: bool,
    qk: str | None = None,
    pv: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    *,
    backend: str = "auto",
    scale: float | None = None,
    return_lse: bool = False,
    qk: str | None = None,
    pv: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in which each query reads the keys its plan names.

    Args:
        q: `[B, H, n_q, D]`.
        k, v: `[B, Hkv, n_kv, D]`, same dtype and device as `q`; H is a multiple of Hkv, and query head h reads head
            `h // (H // Hkv)` (grouped-query attention).
        plan: its batch and head dimensions are 1 or B and H. Where it orders the keys of each query head, k and v of
            fewer heads are repeated as they are put in order; so they are by the backend `masked`.
        backend: a backend's name, which runs or raises, or "auto".
        scale: multiplies the scores; `D ** -0.5` when None.
        return_lse: also return the natural log-sum-exp of the scaled scores.
        qk: "int8" computes Q K^T in 8 bits, with a scale for each token and K less its mean over all keys, which
            softmax does not see and the log-sum-exp is corrected for. Forward only. For normally distributed tokens the
            output is off by about 1 %. With "auto" the backend is then one that can do it.
        pv: "fp8" also computes P V in float8_e4m3, on GPUs of compute capability 8.9 or higher.

    Returns:
        `[B, H, n_q, D]` in the dtype of `q`, and with `return_lse` also `[B, H, n_q]` float32. A query without keys
        gives 0 and -inf.

    Raises:
        ValueError: shapes, dtypes or devices of q, k, v and the plan disagree, or the backend, qk or pv is unknown.
        RuntimeError: the backend cannot run this call, as all but "reference" under transforms of `torch.func`.
    """
    check_inputs(q, k, v, plan)
    precision = Precision(qk, pv)
    chosen = choose_backend(q, k, v, plan, backend, return_lse=return_lse, precision=precision)
    out, lse = attend(chosen, q, k, v, plan, q.shape[-1] ** -0.5 if scale is None else scale, return_lse, precision)
    return (out, lse) if return_lse else out


def attend(
    backend: Backend,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    scale: float,
    return_lse: bool = False,
    precision: Precision = AS_INPUTS,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `Backend.attend` computes; stand-ins of skipped clusters are merged with it where the backend takes none.

    How their values move with the query is added here where the backend does not.
    """
    if wants_gradient(q, k, v):
        plan = plan.for_gradients()
    merged = plan.skipped is not None and not backend.takes_stand_ins(q.device, precision)
    with_lse = return_lse or merged
    if precision == AS_INPUTS:
        result = backend.attend(q, k, v, plan, scale, with_lse)
    else:
        result = backend.attend_quantized(q, k, v, plan, scale, with_lse, precision)
    if result[0].shape != q.shape or (with_lse and (result[1] is None or result[1].shape != q.shape[:-1])):
        shapes = ["None" if x is None else list(x.shape) for x in result]
        raise RuntimeError(
            f"the backend {backend.name} made an output and a log-sum-exp of shape {shapes[0]} and {shapes[1]} for q "
            f"{list(q.shape)}: Backend.attend must return [B, H, N, D], and [B, H, N] where return_lse is true."
        )
    if merged:
        with torch.autocast(q.device.type, enabled=False):  # stand-ins are float32
            result = merge(*result, *attend_skipped(q, plan, scale))
    if plan.skipped is None or plan.skipped.slope is None or backend.takes_slopes(q, k, v):
        return result
    return follow(result[0], q, plan), result[1]


def choose_backend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    backend: str,
    *,
    return_lse: bool = False,
    precision: Precision = AS_INPUTS,
) -> Backend:
    """The backend that will run this call; see `backends.pick`.

    Where the precision is not that of the inputs, "auto" chooses among the backends that have it.
    """
    slopes = plan.skipped is not None and plan.skipped.slope is not None
    if (backend != "reference" or slopes) and (transform := transform_of(q, k, v)) is not None:
        raise RuntimeError(
            f"{transform} supported with the backend 'reference' alone, and with no plan whose stand-ins have slopes "
            "(Tangent): name that backend, or take derivatives in backward mode with torch.autograd, and the batch "
            "dimension in place of vmap."
        )
    grad = wants_gradient(q, k, v)
    shape = (q.device, q.dtype, q.shape[-1], q.shape[2])
    own = plan.skipped is not None and plan.skipped.of_each_tile
    small = not own and plan.n_q < SMALL_TILE * plan.tile_len.shape[-1]
    second = plan.pv_threshold is not None
    request = Request(
        *shape,
        plan.is_dense,
        return_lse,
        grad,
        precision,
        skipped=plan.skipped is not None,
        small_tiles=small,
        second_stage=second,
        shared_masks=plan.shares_masks,
    )
    if precision != AS_INPUTS or second:
        return pick_special(backend, request)
    return pick(backend, request, scattered=plan.is_scattered)


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise a `ValueError` that names what is wrong with q, k and v, before anything is planned from them."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if any(x.ndim != 4 for x in (q, k, v)):
        raise ValueError(f"q, k and v must be [B, H, N, D], got {shapes}.")
    if any(0 in x.shape for x in (q, k, v)):
        raise ValueError(f"q, k and v must not be empty, got {shapes}: batch, heads, length, head_dim must be above 0.")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v must agree in batch and head_dim, k and v in heads and length too, got {shapes}.")
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} heads, and k and v have {k.shape[1]}: the heads of q must be as many, or a multiple "
            "(grouped-query attention), so that each head of k and v serves equally many of them."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}; cast them first.")
    if not q.is_floating_point():
        raise ValueError(f"q, k and v must be of a floating-point dtype, got {q.dtype}; cast them first.")
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q, k and v must lie on one device, got {q.device}, {k.device} and {v.device}; move them first."
        )


def check_inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan) -> None:
    """Raise a `ValueError` that names the disagreement between q, k, v and the plan, if there is one."""
    check_tensors(q, k, v)
    if q.device != plan.device:
        raise ValueError(
            f"q, k, v and the plan must lie on one device, got {q.device} and {plan.device} for the plan; move it with "
            "plan.to(device)."
        )
    if (q.shape[2], k.shape[2]) != (plan.n_q, plan.n_kv):
        raise ValueError(
            f"the plan is for {plan.n_q} queries and {plan.n_kv} keys, but q has {q.shape[2]} and k has {k.shape[2]}."
        )
    orders, heads = 1 if plan.kv_order is None else plan.kv_order.shape[1], k.shape[1]
    if plan.tile_start.shape[1] == 1 and orders not in (1, q.shape[1]):
        raise ValueError(
            f"the plan orders keys for {orders} heads or groups of them, but its tiles are one for all of the "
            f"{q.shape[1]} heads of q: give tiles and runs for each head, or one order for all or for each."
        )
    for axis, size, lead in zip(("batch", "heads"), q.shape[:2], plan.lead, strict=True):
        if lead not in (1, size):
            raise ValueError(f"the plan's {axis} dimension is {lead}, but q has {size}; it must be that or 1.")
    if plan.skipped is not None:
        (batch, count), dim = plan.skipped.lead, plan.skipped.key.shape[-1]
        if batch not in (1, q.shape[0]) or count not in (1, q.shape[1]) or dim != q.shape[-1]:
            raise ValueError(
                f"the plan's stand-ins are for {batch} batch entries and {count} heads of {dim} channels, but q has "
                f"{q.shape[0]}, {q.shape[1]} and {q.shape[-1]}: the first two must be those or 1."
            )
    if orders % heads and heads % orders:
        raise ValueError(
            f"the plan orders keys for {orders} groups of heads, but k and v have {heads} heads: one number must be a "
            "multiple of the other."
        )
