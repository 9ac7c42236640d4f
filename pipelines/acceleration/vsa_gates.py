"""Where the learned part of VSA lies: a linear layer for each self-attention, whose output gates its coarse branch.

A transformer that was trained for VSA (FastVideo's FastWan) has, beside the weights of its class, `GATE` in each of its
blocks: `blocks.N.to_gate_compress.weight` `[D, D]` and `.bias` `[D]`, D the channels of the model; here and there as
`blocks.N.attn1.to_gate_compress`. diffusers' class has no place for them. What they were trained for, `vidaccel
convert fastwan` states as `trained_for` has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...attention import VSA, Method
from ...attention.methods.vsa import CUBE
from ..files.weight_files import HubError, stated_config, transformer_names, transformer_tensors
from ..trained_for import Origin, Stated, read, write
from .learned_layers import LearnedLinear, attach, detach

GATE = "to_gate_compress"
CONFIG = "vsa_config.json"
"""In older folders."""
SMALL = 3072
"""Channels of the largest model that FastVideo's scripts train for a density of .2, as they do 1.3B and 5B; for 14B
it is .1."""


class VSAError(ValueError):
    """Gates for VSA that are missing, or of another model; the message says why, and the fix."""


@dataclass(frozen=True, kw_only=True)
class TrainedVSA:
    """What a transformer was trained for.

    Args:
        density, cube: as those of `VSA`.
    """

    density: float
    cube: tuple[int, int, int]

    @classmethod
    def read(cls, content: Any, where: str) -> TrainedVSA:
        """What a file states.

        Raises:
            VSAError: it states something else.
        """
        try:
            trained = cls(density=content["density"], cube=tuple(content["cube"]))
            trained.method()
        except (ValueError, TypeError, KeyError) as error:
            raise VSAError(f"{where} does not say what its VSA was trained for: {error}") from error
        return trained

    def method(self) -> VSA:
        """The method with the settings of the training."""
        return VSA(density=self.density, cube=self.cube)


def write_config(folder: Path, trained: TrainedVSA) -> Path:
    """Say in the folder of a transformer what it was trained for."""
    return write(folder, VSA.name, asdict(trained))


def read_config(base: str, part: str = "transformer") -> TrainedVSA | None:
    """What a transformer of a pipeline, in a folder or of the hub, was trained for; None where nothing says it.

    Raises:
        VSAError: the file cannot be read.
    """
    return _stated(read(base, part, VSA.name, CONFIG, VSAError))


def _stated(found: tuple[Any, str] | None) -> TrainedVSA | None:
    return None if found is None else TrainedVSA.read(*found)


def published(base: str, part: str = "transformer") -> TrainedVSA | None:
    """What a transformer whose files have gates was trained for where nothing says it; None where they have none.

    FastVideo's files do not say it, and its scripts do.
    """
    if not any(f".{GATE}." in name for name in transformer_names(base, part)):
        return None
    return TrainedVSA(density=published_density(stated_config(base, part) or {}), cube=CUBE)


def published_density(config: Mapping[str, Any]) -> float:
    """The density that FastVideo's scripts have for a transformer of this config: .1 for 14B, .2 for 1.3B and 5B."""
    return density_of_width(config["num_attention_heads"] * config["attention_head_dim"])


def density_of_width(channels: int) -> float:
    """The same for a transformer of so many channels."""
    return 0.2 if channels <= SMALL else 0.1


def find_trained(origins: Mapping[str, Origin], unstated: bool = False) -> TrainedVSA | None:
    """What the transformers of a pipeline were trained for, where they or their files say so.

    Args:
        origins: of the transformers.
        unstated: look for gates that nothing is said of, see `published`.

    Raises:
        VSAError: they were trained for different settings.
        HubError: the hub cannot be asked.
    """
    if unstated:
        found = [None if origin.place is None else published(*origin.place) for origin in origins.values()]
    else:
        found = [_stated(origin.settings(VSA.name, CONFIG, VSAError)) for origin in origins.values()]
    if len(set(found)) > 1 and None not in found:
        raise VSAError(f"the transformers were trained with different settings of VSA: {found}. Give VSA(density=...).")
    return found[0] if len(set(found)) == 1 else None


class GatesAtWork:
    """The gates of one transformer where they belong.

    Args:
        origin: of the transformer.
        modules: its self-attention modules by path.
        method: of the run; another than VSA with gates has none.

    Raises:
        VSAError: its files have none, or not those of each layer, or cannot be had.
    """

    def __init__(self, origin: Origin, modules: Mapping[str, nn.Module], method: Method) -> None:
        self._modules: Mapping[str, nn.Module] = {}
        self._stated: Stated | None = None
        present = all(hasattr(module, GATE) for module in modules.values())
        if not isinstance(method, VSA) or not method.gated or present:  # those that are there already stay
            return
        name, transformer = origin.name, origin.transformer
        try:
            place = origin.place
            tensors = {} if place is None else _read(*place, modules)
            stated = _stated(origin.settings(VSA.name, CONFIG, VSAError))
        except HubError as error:
            raise VSAError(f"the gates of {name} for VSA ({GATE}) are not known: {error}.") from error
        if not tensors:
            where = "its files are not known" if place is None else f"{'/'.join(filter(None, place))} has none"
            if stated is not None:
                where += ", although it was trained for them: it was saved without, as diffusers does by itself"
            raise VSAError(
                f"{name} has no gates for VSA ({GATE}), without which it is another model: {where}. Load one that was "
                "trained for it (FastWan) with from_pretrained, or give its folder or hub id with base=. "
                "VSA(gated=False) needs no training."
            )
        made = [(module, _linear(transformer, module, tensors, path, name)) for path, module in modules.items()]
        attach(transformer, made, GATE)
        self._modules = modules
        trained = stated or TrainedVSA(density=method.density, cube=method.cube)
        self._stated = Stated(transformer, VSA.name, asdict(trained))

    def remove(self) -> None:
        """Take the gates out again. A second call does nothing."""
        detach(self._modules.values(), GATE)
        self._modules = {}
        if self._stated is not None:
            self._stated.remove()
            self._stated = None


def _read(base: str, part: str, modules: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """The gates in the files of a transformer, by the path of the module and the kind of tensor."""
    wanted = {}
    for path in modules:
        for kind in ("weight", "bias"):
            for holder in (path, path.rpartition(".")[0]):  # in the attention, or in its block as it is published
                wanted[f"{holder}.{GATE}.{kind}"] = f"{path}.{kind}"
    return {wanted[name]: tensor for name, tensor in transformer_tensors(base, wanted.__contains__, part).items()}


def _linear(
    transformer: Any, module: nn.Module, tensors: Mapping[str, torch.Tensor], path: str, name: str
) -> LearnedLinear:
    """The gate of a module of a transformer."""
    query: Any = module.get_submodule("to_q")
    like = query.weight
    made = LearnedLinear(query.in_features, query.out_features, device="meta").requires_grad_(False)
    for kind, parameter in dict(made.named_parameters()).items():
        tensor = tensors.get(f"{path}.{kind}")
        if tensor is None or tensor.shape != parameter.shape:
            found = "is missing" if tensor is None else f"is {list(tensor.shape)}"
            raise VSAError(
                f"{name}: the gate of {path} ({GATE}.{kind}) {found}, and this model needs {list(parameter.shape)}: it "
                "was not written as a whole, or is of another model."
            )
        # As the weights beside it, but for those in 8 or 4 bits, and those that are elsewhere until they are needed.
        dtype = like.dtype if like.is_floating_point() and like.element_size() > 1 else transformer.dtype
        tensor = tensor.to(tensor.device if like.is_meta else like.device, dtype)
        setattr(made, kind, nn.Parameter(tensor, requires_grad=False))
    return made


def gate_of(module: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | None:
    """What the gate of a self-attention module makes of its input, `[B, N, D]`; None where it has none.

    The arguments are those of an attention processor.
    """
    gate: Any = getattr(module, GATE, None)
    if gate is None:
        return None
    return gate(hidden_states)
