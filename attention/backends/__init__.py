"""Backends compute attention from a `BlockPlan`. One file each; this one knows their names and picks."""

from __future__ import annotations

import torch

from .base import AS_INPUTS, Backend, Capability, Precision, Request, precision_of
from .flex import FlexBackend
from .gather import GatherBackend
from .masked import MaskedBackend
from .reference import ReferenceBackend
from .sdpa import SdpaBackend
from .triton import TritonBackend

BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (FlexBackend(), GatherBackend(), MaskedBackend(), ReferenceBackend(), SdpaBackend(), TritonBackend())
}

# Best first. On the CPU compiled FlexAttention wins on the blocks and bands of long sequences, one SDPA per query tile
# on scattered runs and wherever a compilation would not pay (measured: benchmarks/results/cpu_speed.md); on
# CUDA a launch per tile would be far too many, and the own kernels were ahead of FlexAttention on every plan that was
# measured (benchmarks/results/h200).
COMPILE_PAYS = 4096  # queries
# Up to here a mask beats a call for each tile where tiles are small. Seconds of one thread over those of dense
# attention, SVG2 and SVG at density .2, masked and gather: 576 tokens 1.5 and 1.7 to 2.9, 1,088 tokens 1.4 and 1.2 to
# 1.6, 2,112 tokens 1.7 to 2.0 and .5 to 1.1. With more threads the mask gains, since small calls use but one.
MASK_PAYS = 1536  # queries
# Where masks are kept, they cost 1.1 to 1.4 of dense attention (Radial, SVG; 576 to 2,112 tokens), and a call for each
# small tile 9 to 2.
SHARED_MASK_PAYS = 2560  # queries
PREFERENCE = {
    ("cpu", "small"): ("masked", "gather", "flex", "reference"),
    ("cpu", "regular"): ("flex", "gather", "reference"),
    ("cpu", "scattered"): ("gather", "flex", "reference"),
    ("cuda", "regular"): ("triton", "flex", "gather", "reference"),
    ("cuda", "scattered"): ("triton", "flex", "gather", "reference"),
}
ELSEWHERE = ("gather", "reference")  # mps, xpu: made of torch's operators alone

# What "auto" must find one of on a device: the others run there too, but slower than dense attention. Of devices that
# are not here nothing was measured, and any backend will do. ROCm's device type is cuda.
WORTHWHILE = {"cpu": ("flex", "gather", "masked"), "cuda": ("triton", "flex")}


def check_backend(name: str) -> str:
    """Return the name of a backend, or "auto".

    Raises:
        ValueError: no backend has that name.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose auto, {', '.join(BACKENDS)}.")
    return name


def runs_somehow(device: torch.device) -> bool:
    """Whether any backend computes sparse attention on a device."""
    return any(b.capability.sparse and b.unavailable(device) is None for b in BACKENDS.values())


def refusal(name: str, device: torch.device) -> str | None:
    """Why sparse attention cannot run on a device with a backend, or with "auto"; None where it can.

    Raises:
        ValueError: no backend has that name.
    """
    if check_backend(name) != "auto":
        reason = BACKENDS[name].unavailable(device)
        return reason if reason or BACKENDS[name].capability.sparse else "computes dense attention only"
    reasons = {n: refusal(n, device) for n in WORTHWHILE.get(device.type, ELSEWHERE)}
    if None in reasons.values():
        return None
    return f"finds no backend that is fast on {device.type}: " + "; ".join(f"{n} {why}" for n, why in reasons.items())


def nothing_is_fast(device: torch.device) -> str | None:
    """Why "auto" would be slower than dense attention on a device; None where it may be faster."""
    reason = refusal("auto", device) if device.type in WORTHWHILE else None
    return reason and f"{reason}. One that is slow runs where it is named, such as 'gather'"


def with_stand_ins(device: torch.device) -> list[str]:
    """Names of the backends that run on a device and attend to what stands for skipped keys (`Method.stands_in`)."""
    return [
        name
        for name, b in BACKENDS.items()
        if b.capability.sparse
        and b.unavailable(device) is None
        and (b.takes_stand_ins(device) or device.type in b.capability.lse)
    ]


def pick(name: str, request: Request, *, scattered: bool) -> Backend:
    """The backend for a call.

    Args:
        name: a backend, which then runs or raises, or "auto".
        request: what the call needs.
        scattered: the plan's tiles read many short runs (`BlockPlan.is_scattered`).

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the named backend cannot run this call, or with "auto" none can; says why for each.
    """
    if check_backend(name) != "auto":
        reason = BACKENDS[name].declines(request)
        if reason:
            raise RuntimeError(f"backend {name!r} cannot run this call: it {reason}. Choose another, or 'auto'.")
        return BACKENDS[name]
    if request.dense and not request.lse and not request.skipped:
        return BACKENDS["sdpa"]
    reasons = {}
    kind = "scattered" if scattered or request.queries < COMPILE_PAYS else "regular"
    order = PREFERENCE.get((request.device.type, kind), ELSEWHERE)
    if request.small_tiles and request.queries <= (SHARED_MASK_PAYS if request.shared_masks else MASK_PAYS):
        order = PREFERENCE.get((request.device.type, "small"), order)
    for candidate in order:
        reason = BACKENDS[candidate].declines(request)
        if reason is None:
            return BACKENDS[candidate]
        reasons[candidate] = reason
    raise RuntimeError("no backend can run this call: " + "; ".join(f"{n} {why}" for n, why in reasons.items()) + ".")


def specials_of(request: Request) -> str:
    """What only some backends compute of a call, in words; empty where any will do."""
    formats = "" if request.precision == AS_INPUTS else str(request.precision)
    return " and ".join(filter(None, (formats, "pv_threshold" if request.second_stage else "")))


def pick_special(name: str, request: Request) -> Backend:
    """The backend for a call that asks for what only some can compute: another precision, or a second stage.

    Args:
        name: a backend, which then runs or raises, or "auto", which chooses among those that can.
        request: what the call needs.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: none of these can run the call; says why for each.
    """
    needed = specials_of(request)
    able = [
        known
        for known, backend in BACKENDS.items()
        if backend.capability.includes(request.precision)
        and (backend.capability.second_stage or not request.second_stage)
    ]
    if check_backend(name) not in ("auto", *able):
        raise RuntimeError(
            f"backend {name!r} does not compute with {needed}: use 'auto' or {' or '.join(map(repr, able))}."
        )
    reasons = {}
    for candidate in able if name == "auto" else [name]:
        reasons[candidate] = BACKENDS[candidate].declines(request)
        if reasons[candidate] is None:
            return BACKENDS[candidate]
    why = "; ".join(f"backend {candidate!r} {reason}" for candidate, reason in reasons.items())
    raise RuntimeError(f"nothing can run this call with {needed}: {why}.")


def special_refusal(
    name: str,
    device: torch.device,
    precision: str | None,
    second_stage: bool = False,
    dtype: torch.dtype = torch.float16,
) -> str | None:
    """Why a device and a backend cannot compute in a precision, or leave out tiles; None where they can.

    What only a call tells, such as its dtype, the first call is asked for.

    Raises:
        ValueError: the backend or the precision is unknown.
    """
    request = Request(device, dtype, 64, 1, False, False, False, precision_of(precision), second_stage=second_stage)
    if not specials_of(request):
        return None
    try:
        pick_special(name, request)
    except RuntimeError as error:
        return str(error)
    return None


__all__ = [
    "BACKENDS",
    "WORTHWHILE",
    "Backend",
    "Capability",
    "Precision",
    "Request",
    "check_backend",
    "nothing_is_fast",
    "pick",
    "pick_special",
    "precision_of",
    "refusal",
    "runs_somehow",
    "special_refusal",
    "with_stand_ins",
]
