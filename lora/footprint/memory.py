"""What a training takes of each GPU's memory at least, from shapes alone: told before clips are encoded for hours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import ConfigError, Settings, flat, with_overrides
from ..settings import PhaseSettings

_STATE = {
    "adamw": 8.0,
    "muon": 4.0,
    "adamw_8bit_torchao": 2.0,
    "adamw_8bit_bitsandbytes": 2.0,
    "adamw_fp8_torchao": 2.0,
    "adamw_4bit_torchao": 1.0,
    "prodigy": 16.0,
}
"""Bytes of an optimiser's state for each trained number; of muon those of matrices."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on each GPU, at least.

    Args:
        frozen: of weights that are not trained, those of a second model among them.
        trained: of weights that are, with gradients, optimiser and EMA.
        kept: of what gradient checkpointing keeps of a forward pass: the input of each layer.
        layers, tokens, clips: that this is the product of; 0 layers where nothing is known of them.
        checkpointed: whether gradient checkpointing is on; without it many times as much is kept.
    """

    frozen: float
    trained: float
    kept: float
    layers: int
    tokens: int
    clips: int
    checkpointed: bool

    @property
    def total(self) -> float:
        return self.frozen + self.trained + self.kept

    def __str__(self) -> str:
        """A sentence: "memory of each process, at least 60.4 GB: 28.6 GB of frozen weights, ..."."""
        parts = [f"{_gb(self.frozen)} of frozen weights"] if self.frozen else []
        parts += [f"{_gb(self.trained)} of what is trained (weights, gradients, optimiser)"]
        if self.layers:
            clips = f"{self.clips} clip{'s' if self.clips > 1 else ''}"
            of = f"{self.layers} layers, {self.tokens:,} tokens, {clips}"
            more = "" if self.checkpointed else "; without loop.gradient_checkpointing many times that"
            parts += [f"{_gb(self.kept)} kept for the gradients ({of}{more})"]
        return f"memory of each process, at least {_gb(self.total)}: {', '.join(parts)}; and what a layer works with."


def training_memory(
    skeleton: nn.Module,
    trained: int,
    phase: PhaseSettings,
    *,
    weight_bytes: float,
    linear_bytes: float | None = None,
    offloaded: float = 0.0,
    copies: int = 1,
    shared_by: int = 1,
    layers: int = 0,
    width: int = 0,
    sizes: Iterable[tuple[int, int]] = (),
    activation_bytes: int = 4,
    checkpointed: bool = True,
) -> TrainingMemory:
    """What a training of a transformer takes.

    Args:
        skeleton: the transformer, with or without weights.
        trained: numbers that are trained.
        phase: its optimiser and EMA.
        weight_bytes: of a frozen number; `linear_bytes` of one in a linear layer, where that is another.
        offloaded: bytes of frozen weights that are in the memory of the CPU.
        copies: of the frozen weights, 0 where all are trained and there is no second model.
        shared_by: processes that the weights are spread over.
        layers, width: of the transformer.
        sizes: tokens and clips of a micro-batch, for each size.
        activation_bytes: of a number between layers.
        checkpointed: see `TrainingMemory`.
    """
    count = sum(p.numel() for p in skeleton.parameters())
    linear = sum(m.weight.numel() for m in skeleton.modules() if isinstance(m, nn.Linear))
    one = (count - linear) * weight_bytes + linear * (weight_bytes if linear_bytes is None else linear_bytes)
    each = 8 + _STATE[phase.optimizer] + (4 if phase.ema_decay else 0)
    tokens, clips = max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))
    kept = layers * tokens * clips * width * activation_bytes
    known = layers if tokens else 0
    return TrainingMemory(
        copies * one / shared_by - offloaded, trained * each / shared_by, kept, known, tokens, clips, checkpointed
    )


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """The layers of a transformer whose inputs gradient checkpointing keeps: the members of its lists of them."""
    lists = [module for name, module in transformer.named_children() if isinstance(module, nn.ModuleList)]
    return [block for blocks in lists for block in blocks if any(isinstance(m, nn.Linear) for m in block.modules())]


class OutOfMemory(RuntimeError):
    """A GPU had too little memory; the message says where, what takes less, and how to go on."""


@dataclass(frozen=True)
class _Saving:
    """What takes less memory.

    Args:
        name, now: the setting, and the value of it that leaves room.
        instead: settings that take less.
        words: for them; "" for `instead` itself.
        free: they may change at a resume.
        trains: it is memory of the gradients, of which a validation has none.
    """

    name: str
    now: Any
    instead: tuple[str, ...]
    words: str = ""
    free: bool = False
    trains: bool = False


_CHECKPOINTS = "loop.gradient_checkpointing=true"
_SAVINGS = (
    _Saving("loop.gradient_checkpointing", False, (_CHECKPOINTS,), free=True, trains=True),
    _Saving(
        "model.offload_blocks",
        0,
        ("model.offload_blocks=1", _CHECKPOINTS),
        "model.offload_blocks (with loop.gradient_checkpointing)",
        free=True,
    ),
    _Saving("model.quantise", "none", ("model.quantise=int8",)),
    _Saving("model.autoencoder_tiling", False, ("model.autoencoder_tiling=true",)),
)


def _savings(config: Settings, trains: bool) -> Iterator[tuple[bool, str]]:
    """Those that these settings leave room for and can have: whether a resume may change them, and words for them."""
    values = flat(config)
    for saving in _SAVINGS:
        if values.get(saving.name) == saving.now and (trains or not saving.trains):
            with contextlib.suppress(ConfigError):  # what the recipe refuses is no advice
                with_overrides(config, saving.instead)
                yield saving.free, saving.words or ", ".join(saving.instead)


def out_of_memory(
    config: Settings,
    where: str,
    go_on: str,
    *,
    trains: bool = True,
    measures: bool = False,
    makes_videos: bool = False,
) -> OutOfMemory:
    """What to raise where a GPU's memory ran out.

    Args:
        config: settings of the run.
        where: it was, as it reads after "the GPU ran out of memory".
        go_on: how the run is continued, a sentence without its end.
        trains: whether what training alone takes was there, or would have come.
        measures: whether clips were measured, which may be smaller.
        makes_videos: whether those of `validation.prompts` were made, which need not be.
    """
    values, savings = flat(config), list(_savings(config, trains))
    free, fixed = ([words for may, words in savings if may == wanted] for wanted in (True, False))
    one_by_one = measures and any(name.startswith("validation.size") for name in values)
    if makes_videos and values.get("validation.prompts"):
        free.insert(0, "validation.prompts=[]")
    if one_by_one:
        free.insert(0, "validation.size (smaller; a clip is measured at a time)")
    for name, value in values.items() if trains or measures else ():
        if name.endswith(".batch_size") and (value or 1) > 1 and not one_by_one:
            if name.startswith("data."):  # the micro-steps are the phase's, of all sizes
                fixed.append(f"a smaller {name}")
            else:
                free.append(f"{name} (with as many times the gradient_accumulation_steps)")
    if trains or measures:
        fixed.append("smaller clips in data.sizes")
    may = f" A resume may change {', '.join(free)}." if free else ""
    new = f"A new run, in another `out`, may have {', '.join(fixed)}; several" if fixed else "Several"
    return OutOfMemory(
        f"the GPU ran out of memory {where}.{may} {new} GPUs share the weights with FSDP. As it stands: {go_on}"
    )


def gpu_bytes(device: torch.device) -> int | None:
    """The memory of a GPU; None of other devices."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def peak_gigabytes(device: torch.device) -> dict[str, float]:
    """The most memory that tensors took on a GPU so far, as a number of the log; nothing on other devices."""
    return {"memory_gb": torch.cuda.max_memory_allocated(device) / 1e9} if device.type == "cuda" else {}


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
