"""What a backend is: its limits as data, and one function that computes attention from a plan."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..plan import BlockPlan

ANY_HEAD_DIM = 2**31
EVERYWHERE = ("cpu", "cuda", "mps", "xpu")  # for backends made of torch's operators
SMALL_TILE = 64  # queries: fewer take less time than a call for them
NO_FLOAT64 = ("mps",)


@dataclass(frozen=True)
class Precision:
    """In which formats attention multiplies.

    Args:
        qk: "int8" computes Q K^T in 8 bits: Q and K quantised token by token, K less its mean over all keys; no
            gradient. None: in the dtype of the inputs.
        pv: "fp8" computes P V in float8_e4m3, with one scale per channel of V; only with `qk="int8"`. None: in the
            dtype of the inputs.

    Raises:
        ValueError: another value, or `pv` without `qk`.
    """

    qk: str | None = None
    pv: str | None = None

    def __post_init__(self) -> None:
        for name, known in (("qk", "int8"), ("pv", "fp8")):
            value = getattr(self, name)
            if value is not None and value != known:
                raise ValueError(f'{name}={value!r} is unknown: choose "{known}", or None for the dtype of the inputs.')
        if self.pv is not None and self.qk is None:
            raise ValueError(f'pv={self.pv!r} needs qk="int8": there is no kernel with P V alone in 8 bits.')

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in (("qk", self.qk), ("pv", self.pv)) if value is not None)


AS_INPUTS = Precision()
FP8_IS_SLOWER = (
    "fp8 is for single calls alone: on Hopper the compiled kernel takes 720 instructions for 64 keys with P V in fp8, "
    "and 425 in bfloat16, and elsewhere nothing was measured"
)


def precision_of(name: str | None) -> Precision:
    """What the `precision` of a model means: None, the dtype of the inputs, or "int8", Q K^T in 8 bits.

    Raises:
        ValueError: another name.
    """
    if name not in (None, "int8"):
        why = f" ({FP8_IS_SLOWER})" if name == "fp8" else ""
        raise ValueError(f'precision is {name!r}: choose "int8", or None for that of the model{why}.')
    return Precision(name)


def without_autocast(
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `attend` of a backend makes of q, k and v in the dtype of autocast, and of all else as it is.

    Autocast would round the bias of what stands for skipped clusters, too, and scores that are written out.
    """
    device = q.device.type
    narrow = torch.get_autocast_dtype(device) if q.dtype == torch.float32 else q.dtype
    with torch.autocast(device, enabled=False):
        out, lse = attend(*(x.to(narrow) for x in (q, k, v)), *rest)
    return out.to(q.dtype), lse


@dataclass(frozen=True)
class Capability:
    """What a backend can run.

    Args:
        devices: device types, such as "cpu".
        dtypes: of q, k and v.
        max_head_dim: largest head dimension.
        lse: device types where it can return the log-sum-exp.
        backward: device types where gradients flow.
        sparse: skips what the plan skips; without it the backend takes dense plans only.
        stand_ins: device types where `attend` itself attends to what stands for skipped clusters; elsewhere it needs
            the log-sum-exp, with which that part is merged.
        qk, pv: the values of `Precision` that it can compute with, besides None.
        second_stage: device types where it leaves out tiles within the softmax (`BlockPlan.pv_threshold`).
    """

    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    max_head_dim: int
    lse: tuple[str, ...]
    backward: tuple[str, ...]
    sparse: bool
    stand_ins: tuple[str, ...] = ()
    qk: tuple[str, ...] = ()
    pv: tuple[str, ...] = ()
    second_stage: tuple[str, ...] = ()

    def includes(self, precision: Precision) -> bool:
        """Whether it can compute with these formats."""
        return precision.qk in (None, *self.qk) and precision.pv in (None, *self.pv)


@dataclass(frozen=True)
class Request:
    """What one call needs; `Backend.declines` reads it.

    Args:
        device, dtype, head_dim: of q, k and v.
        queries: length of q.
        dense: the plan covers every pair.
        lse: the log-sum-exp is wanted.
        grad: an input requires a gradient.
        precision: in which formats to multiply.
        skipped: the plan has stand-ins for skipped clusters.
        small_tiles: its tiles have fewer than `SMALL_TILE` queries on average, and no stand-ins of their own.
        second_stage: the plan has a `pv_threshold`.
        shared_masks: one mask, or a few that stay the same from call to call, serve all heads.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    queries: int
    dense: bool
    lse: bool
    grad: bool
    # No default: torch.compile of torch 2.11 cannot trace one that is an object.
    precision: Precision
    skipped: bool = False
    small_tiles: bool = False
    second_stage: bool = False
    shared_masks: bool = False


class Backend(abc.ABC):
    """Computes attention from a `BlockPlan`."""

    name: ClassVar[str]
    summary: ClassVar[str]
    capability: ClassVar[Capability]

    def unavailable(self, device: torch.device) -> str | None:
        """Why this machine cannot run the backend on `device`; None when it can."""
        if device.type not in self.capability.devices:
            return f"runs on {', '.join(self.capability.devices)}, not on {device.type}"
        return None

    def takes_stand_ins(self, device: torch.device, precision: Precision = AS_INPUTS) -> bool:
        """Whether it attends itself to what stands for skipped clusters; with values in fp8 none does."""
        return device.type in self.capability.stand_ins and precision.pv is None

    def takes_slopes(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
        """Whether `attend` itself adds how the values of stand-ins move with the query (`slopes.py`)."""
        return False

    def declines(self, request: Request) -> str | None:
        """Why the backend cannot run this call; None when it can."""
        limits = self.capability
        reason = self.unavailable(request.device)
        if reason:
            return reason
        if request.dtype == torch.float64 and request.device.type in NO_FLOAT64:
            return f"has no float64 on {request.device.type}"
        if request.dtype not in limits.dtypes:
            known = ", ".join(str(d).removeprefix("torch.") for d in limits.dtypes)
            return f"takes {known}, not {str(request.dtype).removeprefix('torch.')}"
        if request.head_dim > limits.max_head_dim:
            return f"takes head dimensions up to {limits.max_head_dim}, not {request.head_dim}"
        merged = request.skipped and not self.takes_stand_ins(request.device, request.precision)
        if (request.lse or merged) and request.device.type not in limits.lse:
            return f"returns no log-sum-exp on {request.device.type}"
        if request.grad and request.device.type not in limits.backward:
            return f"has no backward on {request.device.type}"
        if not limits.includes(request.precision):
            return f"does not compute with {request.precision}"
        if request.grad and request.precision != AS_INPUTS:
            return f"has no backward with {request.precision}: call it under torch.no_grad(), or train without"
        if request.second_stage and request.device.type not in limits.second_stage:
            return "leaves out no tiles within the softmax (pv_threshold)"
        if request.second_stage and request.grad:
            return "has no backward with pv_threshold: call it under torch.no_grad(), or train without"
        if not request.dense and not limits.sparse:
            return "computes dense attention only"
        return None

    def describe(self) -> str:
        """The limits in one line."""
        limits = self.capability
        dtypes = "/".join(str(d).removeprefix("torch.") for d in limits.dtypes)
        head_dim = "any head_dim" if limits.max_head_dim >= ANY_HEAD_DIM else f"head_dim <= {limits.max_head_dim}"
        lse, backward = ("/".join(where) or "nowhere" for where in (limits.lse, limits.backward))
        kind = "any plan" if limits.sparse else "dense plans"
        text = f"{'/'.join(limits.devices)}; {dtypes}; {head_dim}; {kind}; LSE on {lse}; backward on {backward}"
        formats = [f"{name} {value}" for name in ("qk", "pv") for value in getattr(limits, name)]
        formats += ["pv_threshold"] if limits.second_stage else []
        return "; ".join([text, *formats])

    def prepare(  # noqa: B027 (most backends take a plan as it is)
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: BlockPlan,
        precision: Precision,
    ) -> None:
        """Make of a plan what `attend`, or `attend_quantized`, will need of it in this call, and keep it there: so this
        is timed as planning.
        """

    @abc.abstractmethod
    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute attention.

        Args:
            q: `[B, H, n_q, D]`, k, v: `[B, Hkv, n_kv, D]`, not permuted; H is a multiple of Hkv (see `groups.py`).
            plan: on the same device, its orders not yet applied. Its `skipped` is read where `takes_stand_ins` says so,
                and then belongs to the result; its slopes where `takes_slopes` does.
            scale: multiplies the scores.
            return_lse: whether the second result is `[B, H, n_q]` float32 or None.
        """

    def scales_of(self, q: torch.Tensor, plan: BlockPlan, precision: Precision) -> str:
        """How the quantised inputs of a call are scaled, in words."""
        return "with a scale for each token"

    def attend_quantized(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: BlockPlan,
        scale: float,
        return_lse: bool,
        precision: Precision,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Like `attend`, with the formats of `precision`, which the backend's capability includes."""
        raise NotImplementedError(f"backend {self.name!r} does not compute with {precision}.")
