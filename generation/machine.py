"""The machine that a run is for: device, dtype, backend, and what a reader should know of it."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import TYPE_CHECKING

from ..pipelines.device_names import cpu_words, gpu_words
from ..pipelines.nearest_name import nearest
from .errors import BadInput, mention
from .models.places import DEMOS

if TYPE_CHECKING:
    import torch

    from ..attention.methods.base import Method

DTYPES = ("float32", "bfloat16", "float16")
MOST_THREADS = 1024
"""That torch is set to: OpenMP ends the process where the system starts no more of them."""


def choose_device(name: str | torch.device, offload: bool | str) -> torch.device:
    """The device that `device` means; BadInput when this machine lacks it.

    Every kind of accelerator that this build of torch has will do (cuda, which ROCm is as well, mps, xpu, ...).
    """
    import torch

    from ..pipelines.loading import BLOCKS

    if offload not in (False, True, BLOCKS):
        raise BadInput("offload", f'it must be True, False or "{BLOCKS}"', value=repr(offload))
    name = str(name)
    present = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        name = "cpu" if present is None else present.type
    known = "auto, cpu" + ("" if present is None else f" or {present.type} (or {present.type}:N)")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadInput("device", "torch knows no such device", f"Give {known}.", value=name) from error
    if device.type != "cpu":
        if present is None or present.type != device.type:
            found = f"torch {torch.__version__} finds no {_spelled(device.type)} device here"
            raise BadInput("device", found, f"Give {known}.", value=name)
        count = torch.accelerator.device_count()
        if (device.index or 0) >= count:
            raise BadInput("device", f"there are {count}, counted from 0", value=name)
    if offload and device.type == "cpu":
        raise BadInput(
            "offload",
            f"moves parts between an accelerator and main memory, and the device is {device}",
            f"Leave it out, or give {mention('device')}.",
        )
    return device


def _spelled(kind: str) -> str:
    return {"cuda": "CUDA", "mps": "MPS", "xpu": "XPU"}.get(kind, kind)


def check_runs(backend: str, device: torch.device, sparse: bool) -> None:
    """Raise BadInput when a backend is unknown or cannot run here, sparsely where that is wanted."""
    from ..attention.backends import BACKENDS, refusal

    if backend != "auto" and backend not in BACKENDS:
        raise BadInput("backend", f"there is none of that name{nearest(backend, ['auto', *BACKENDS])}", value=backend)
    if sparse:
        reason = refusal(backend, device)
    else:
        reason = None if backend == "auto" else BACKENDS[backend].unavailable(device)
    if reason is not None:
        fix = "" if backend == "auto" else "Give auto, or another."
        raise BadInput("backend", f"it cannot be used here: it {reason}", fix, value=backend)


def check_stand_ins(backend: str, device: torch.device, method: Method) -> None:
    """Raise BadInput when a backend that was given cannot compute what stands for the keys that a method skips."""
    from ..attention.backends import with_stand_ins

    known = ["auto", *with_stand_ins(device)]
    if method.stands_in and backend not in known:
        problem = f"{backend} cannot compute what stands for the keys that {method.name} skips on {device.type}"
        raise BadInput("backend", problem, f"Give {', '.join(known)}, or another {mention('method')}.", value=backend)


def check_precision(precision: str | None) -> None:
    """Raise BadInput for a precision of attention that there is not."""
    from ..attention.backends import precision_of

    try:
        precision_of(precision)
    except ValueError as error:
        raise BadInput("precision", str(error).partition(": ")[2].rstrip("."), value=precision) from error


def check_formats(backend: str, device: torch.device, precision: str | None, dtype: torch.dtype) -> None:
    """Raise BadInput when neither a backend that was given nor, with auto, any can compute in a precision."""
    from ..attention.backends import special_refusal

    reason = special_refusal(backend, device, precision, dtype=dtype)
    if reason is not None:
        raise BadInput("precision", reason.rstrip("."), "Leave it out.", value=precision)


def check_second_stage(backend: str, device: torch.device, method: Method) -> None:
    """Raise BadInput when a method leaves out tiles within the softmax, and no backend here does."""
    from ..attention.backends import special_refusal

    reason = special_refusal(backend, device, None, method.second_stage)
    if reason is not None:
        problem = f"its pv_threshold cannot be had here: {reason.rstrip('.')}"
        raise BadInput("method", problem, "Leave pv_threshold out.", value=method.name)


def choose_dtype(name: str | torch.dtype, device: torch.device, model: str) -> torch.dtype:
    """The dtype that `dtype` means; BadInput for one that models are not run in."""
    import torch

    name = str(name).removeprefix("torch.")
    if name != "auto" and name not in DTYPES:
        raise BadInput("dtype", f"it must be auto, {', '.join(DTYPES)}", value=name)
    if name == "auto":
        # The built-in models were trained and measured in float32, and CPUs are slow in bfloat16.
        name = "float32" if device.type == "cpu" or model in DEMOS else "bfloat16"
    return getattr(torch, name)


def environment(device: torch.device) -> dict[str, str]:
    """Versions and hardware, for a reader."""
    import torch

    from .. import __version__

    facts = {"vidaccel": __version__, "Python": platform.python_version()}
    facts.update({name: version_of(name) for name in ("torch", "diffusers", "transformers", "triton")})
    facts["system"] = f"{platform.system()} {platform.machine()}"
    cores = os.cpu_count()
    facts["CPU"] = cpu_words(f", {cores} logical core{'s' if cores != 1 else ''}")
    if device.type == "cuda":
        facts["GPU"] = f"{gpu_words(device)}, CUDA {torch.version.cuda}"
    facts["device"] = str(device)
    return facts


def version_of(package: str) -> str:
    """The version of a package, "not installed" without it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        # Looked for only now, as it reads every distribution: that of triton has another name on ROCm and on Windows.
        others = metadata.packages_distributions().get(package)
        return metadata.version(others[0]) if others else "not installed"


def synchronise(device: torch.device) -> None:
    """Wait for an accelerator, whose work would otherwise be timed in whatever waits for it next."""
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)
