"""Where the learned part of SLA lies: a projection in each self-attention module, and what it was trained for beside.

A transformer that was trained for SLA has, beside the weights of its class, `PROJECTION` in each of its self-attention
modules but the first `dense_layers`: for Wan `blocks.N.attn1.proj_l.weight` `[D, D]` and `.bias` `[D]`, D the channels
of a head. They lie in the files of its weights, as `save_pretrained` writes them. What they were trained for is stated
as `trained_for` has it. An adapter (a LoRA) has the same tensors in its file, and the same facts in its header, below
"sla".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...attention import SLA, DenseSchedule
from ..files.weight_files import transformer_tensors
from ..trained_for import Origin, read, write
from .learned_layers import LearnedLinear, attach

PROJECTION = "proj_l"
CONFIG = "sla_config.json"
"""In older folders."""
ROUTING = "centred_keys"
"""How blocks are chosen: by the means of queries, and of keys less the mean of all keys."""


class SLAError(ValueError):
    """Weights for SLA that are missing or were trained for something else; the message says why, and the fix."""


@dataclass(frozen=True, kw_only=True)
class TrainedSLA:
    """What a transformer was trained for.

    Args:
        linear_scope, feature_map, topk, skip, eps: as those of `SLA`; `eps` is the number itself.
        block_q, block_k: tokens of a query block and of a key block.
        blocks: tokens of a video that was trained on -> key blocks that each of its query blocks read.
        dense_layers, dense_steps: first ones that stayed dense.
        base, base_hash: name and hash (`transformer_files`) of the transformer that the training began with; empty
            where that is not known.
        routing: how blocks are chosen.
    """

    linear_scope: str
    feature_map: str
    topk: float
    block_q: int
    block_k: int
    eps: float
    blocks: Mapping[int, int]
    skip: float | None = None
    dense_layers: int = 0
    dense_steps: int = 0
    base: str = ""
    base_hash: str = ""
    routing: str = ROUTING

    @classmethod
    def of(cls, method: SLA, tokens: Iterable[int], base: str = "", base_hash: str = "") -> TrainedSLA:
        """What a training with a method on videos of so many tokens makes."""
        schedule = method.schedule
        return cls(
            linear_scope=method.linear_scope,
            feature_map=method.feature_map,
            topk=method.topk,
            block_q=method.block[0],
            block_k=method.block[1],
            eps=method.added_eps,
            blocks={count: method.blocks_read(count) for count in tokens},
            skip=method.skip,
            dense_layers=int(schedule.first_layers),
            dense_steps=int(schedule.first_steps),
            base=base,
            base_hash=base_hash,
        )

    @classmethod
    def stated(cls, content: Any, where: str) -> TrainedSLA:
        """From what `facts` gave, as JSON has it.

        Raises:
            SLAError: something is missing, or of another kind.
        """
        try:
            known = {f.name: content[f.name] for f in fields(cls) if f.name in content}
            known["blocks"] = {int(tokens): int(count) for tokens, count in content["blocks"].items()}
            trained = cls(**known)
            trained.method()
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise SLAError(f"{where} does not say what its SLA was trained for: {error}") from error
        if trained.routing != ROUTING:
            raise SLAError(
                f"{where} was trained with blocks chosen by {trained.routing}, and this version knows {ROUTING}."
            )
        return trained

    def facts(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {**asdict(self), "blocks": {str(tokens): count for tokens, count in self.blocks.items()}}

    def method(self) -> SLA:
        """The method with the settings of the training."""
        return SLA(
            topk=self.topk,
            block=(self.block_q, self.block_k),
            linear_scope=self.linear_scope,  # type: ignore[arg-type]  # checked by the method
            feature_map=self.feature_map,  # type: ignore[arg-type]
            skip=self.skip,
            eps=self.eps,
            schedule=DenseSchedule(first_layers=self.dense_layers, first_steps=self.dense_steps),
        )

    def check(self, method: SLA, schedule: DenseSchedule, where: str) -> None:
        """Raise SLAError where a run would be another than the training, and say in what."""
        own = self.method()
        pairs = {
            "linear_scope": (method.linear_scope, own.linear_scope),
            "feature_map": (method.feature_map, own.feature_map),
            "block": (method.block, own.block),
            "skip": (method.skip, own.skip),
            "eps": (method.added_eps, own.added_eps),
            "schedule": (schedule, own.schedule),
        }
        if own.linear_scope == "none":  # which has neither
            del pairs["feature_map"], pairs["eps"]
        found = [
            f"{name} is {given}, trained with {wanted}" for name, (given, wanted) in pairs.items() if given != wanted
        ]
        read = {tokens: method.blocks_read(tokens) for tokens in self.blocks}
        wrong = next((tokens for tokens in read if read[tokens] != self.blocks[tokens]), None)
        if wrong is not None:
            found.append(
                f"topk {method.topk:g} reads {read[wrong]} of {method.key_blocks(wrong)} key blocks at {wrong:,} "
                f"tokens, trained with {self.blocks[wrong]} (topk {self.topk:g})"
            )
        elif not self.blocks and method.topk != self.topk:
            found.append(f"topk is {method.topk:g}, trained with {self.topk:g}")
        if found:
            raise SLAError(
                f"{where} was trained for other settings of SLA: {'; '.join(found)}. Use those of the training: "
                'accelerate(pipe, "sla") takes them.'
            )


# -- files -------------------------------------------------------------------------------------------------------------


def names_in(layers: Iterable[str]) -> list[str]:
    """Names of the tensors of the projections of some self-attention modules, in files and in `state_dict`."""
    return [f"{layer}.{PROJECTION}.{kind}" for layer in layers for kind in ("weight", "bias")]


def write_config(folder: Path, trained: TrainedSLA) -> Path:
    """Say in the folder of a transformer what it was trained for."""
    return write(folder, SLA.name, trained.facts())


def read_config(base: str, part: str = "transformer") -> TrainedSLA | None:
    """What a transformer of a pipeline, in a folder or of the hub, was trained for; None where it was not.

    Raises:
        SLAError: the file cannot be read.
    """
    return _stated(read(base, part, SLA.name, CONFIG, SLAError))


def trained_of(origin: Origin) -> TrainedSLA | None:
    """The same of a transformer that is loaded."""
    return _stated(origin.settings(SLA.name, CONFIG, SLAError))


def _stated(found: tuple[Any, str] | None) -> TrainedSLA | None:
    return None if found is None else TrainedSLA.stated(*found)


def read_projections(base: str, layers: Iterable[str], part: str = "transformer") -> dict[str, torch.Tensor]:
    """The tensors of the projections of some self-attention modules, by their names in the files.

    Raises:
        SLAError: one is missing.
    """
    wanted = set(names_in(layers))
    found = transformer_tensors(base, wanted.__contains__, part)
    check_complete(wanted, found, f"{part} of {base}")
    return found


def check_complete(wanted: Iterable[str], found: Iterable[str], where: str) -> None:
    """Raise SLAError where a projection is missing: without it, a layer would give another result in silence."""
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise SLAError(
            f"{where} lacks {len(missing)} tensors of SLA, such as {missing[0]}: it was not written as a whole, or has "
            "fewer layers than this model."
        )


# -- modules -----------------------------------------------------------------------------------------------------------


def add_projections(modules: Mapping[str, nn.Module], head_dim: int) -> None:
    """Give self-attention modules a projection each, as a training starts: zero, in float32."""
    for module in modules.values():
        module.add_module(PROJECTION, _projection(module, head_dim))


@torch.no_grad()
def load_projections(
    transformer: nn.Module, modules: Mapping[str, nn.Module], tensors: Mapping[str, torch.Tensor], head_dim: int
) -> None:
    """Give self-attention modules of a transformer the projections in some tensors, without gradients.

    Raises:
        SLAError: they are of another shape.
    """
    for layer in modules:
        for name, shape in zip(names_in([layer]), ([head_dim, head_dim], [head_dim]), strict=True):
            if list(tensors[name].shape) != shape:
                raise SLAError(f"{name} is {list(tensors[name].shape)}, and this model needs {shape}: give its own.")
    made = {layer: _projection(module, head_dim).requires_grad_(False) for layer, module in modules.items()}
    for layer, projection in made.items():
        for name, parameter in zip(names_in([layer]), (projection.weight, projection.bias), strict=True):
            parameter.copy_(tensors[name])
    attach(transformer, ((modules[layer], projection) for layer, projection in made.items()), PROJECTION)


def _projection(module: nn.Module, head_dim: int) -> LearnedLinear:
    """One of zeros, where the weights of a self-attention module are; on the CPU where these are elsewhere."""
    device = next(module.parameters()).device
    made = LearnedLinear(head_dim, head_dim, device="cpu" if device.type == "meta" else device)
    nn.init.zeros_(made.weight)
    nn.init.zeros_(made.bias)
    return made
