"""SLA in a pipeline: finding what its transformers were trained for, and giving them their projections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...attention import SLA, DenseSchedule, Method
from ..base_check import check_base
from ..files.adapter_files import read_header, read_split
from ..loras.named_lora import NamedLora
from ..trained_for import Origin, Stated
from .learned_layers import detach
from .sla_weights import (
    PROJECTION,
    SLAError,
    TrainedSLA,
    check_complete,
    load_projections,
    names_in,
    read_projections,
    trained_of,
)

RECIPE = "sla"
_LORA = "sla"
"""Name of the LoRA among those of the transformer."""
TRAIN = "train one with `vidaccel adapt sla`"


@dataclass(frozen=True)
class SLAAdapter:
    """An adapter of the recipe `sla`: a LoRA, and the projections.

    Args:
        path: of the file.
        part: name of the transformer in its pipeline.
        trained: what it was trained for, its base among it.
        names: of its tensors.
    """

    path: Path
    part: str
    trained: TrainedSLA
    names: frozenset[str]

    @property
    def base(self) -> str:
        return self.trained.base

    @property
    def base_hash(self) -> str:
        return self.trained.base_hash


def read_adapter(location: str | Path) -> SLAAdapter:
    """What the header of an adapter says.

    Args:
        location: of the file, its folder, or that of a run, see `run_folder.adapter_path`.

    Raises:
        SLAError: there is none, or it is of another recipe.
    """
    path, facts, shapes = read_header(location, RECIPE, SLAError)
    return SLAAdapter(path, str(facts.get("part")), TrainedSLA.stated(facts.get("sla"), str(path)), frozenset(shapes))


@dataclass(frozen=True)
class Learned:
    """Where what a transformer learned of SLA lies.

    Args:
        trained: what it was trained for.
        place: folder or hub id of its pipeline, and the part of it; None where an adapter has it.
        adapter: the adapter.
    """

    trained: TrainedSLA
    place: tuple[str, str] | None = None
    adapter: SLAAdapter | None = None

    @property
    def where(self) -> str:
        """In words."""
        if self.adapter is not None:
            return self.adapter.path.name
        return "/".join(filter(None, self.place or ()))


def find_learned(origins: Mapping[str, Origin], adapters: Sequence[str | Path] = ()) -> dict[str, Learned]:
    """What each transformer of a pipeline learned of SLA; those that learned nothing are left out.

    Args:
        origins: of the transformers by their names in the pipeline.
        adapters: files or folders of adapters, one for each transformer; none where the weights themselves were
            trained.

    Raises:
        SLAError: an adapter of something else, or not one for each transformer.
        HubError: the hub cannot be asked.
    """
    if adapters:
        read = [read_adapter(adapter) for adapter in adapters]
        found = {adapter.part: adapter for adapter in read}
        if found.keys() != origins.keys() or len(found) < len(read):
            given = ", ".join(f"{adapter.path.name} for {adapter.part}" for adapter in read)
            raise SLAError(
                f"there is {' and '.join(origins)}, and the adapters are {given}: give one for each transformer."
            )
        for name, origin in origins.items():
            check_base(origin.transformer, name, found[name], origin.base, SLAError)
        return {name: Learned(adapter.trained, adapter=adapter) for name, adapter in found.items()}
    trained = {name: trained_of(origin) for name, origin in origins.items()}
    return {name: Learned(each, origins[name].place) for name, each in trained.items() if each is not None}


def method_of(learned: Mapping[str, Learned], transformers: Mapping[str, Any]) -> SLA:
    """The settings that all transformers of a pipeline were trained with.

    Raises:
        SLAError: one was not trained, or they differ.
    """
    missing = [name for name in transformers if name not in learned]
    if missing:
        raise SLAError(
            f"{' and '.join(missing)} was not trained for SLA, or is not loaded from the folder that says so: "
            f'load it with from_pretrained, give its adapter, or {TRAIN}. SLA(linear_scope="none") '
            "needs no training."
        )
    methods = {name: found.trained.method() for name, found in learned.items()}
    first, *others = methods.values()
    if any(other != first for other in others):
        raise SLAError(f"the transformers were trained with different settings of SLA: {methods}. Train both alike.")
    return first


class LearnedAtWork:
    """The projections of one transformer, and its LoRA, where they belong.

    Args:
        pipe: its pipeline.
        name, transformer: of it.
        modules: its self-attention modules by path.
        learned: what it learned; None where that is not known.
        method, schedule: of the run.

    Raises:
        SLAError: it learned nothing, or for other settings.
    """

    def __init__(
        self,
        pipe: Any,
        name: str,
        transformer: Any,
        modules: Mapping[str, nn.Module],
        learned: Learned | None,
        method: Method,
        schedule: DenseSchedule,
    ) -> None:
        self._modules: Mapping[str, nn.Module] = {}
        self._lora: NamedLora | None = None
        self._stated: Stated | None = None
        self.trained: TrainedSLA | None = None
        present = any(hasattr(module, PROJECTION) for module in modules.values())
        if not isinstance(method, SLA) or present:  # those of a training are there already
            return
        if learned is None:
            if method.needs_weights:
                method_of({}, {name: transformer})
            return
        self.trained = learned.trained
        learned.trained.check(method, schedule, learned.where)
        modules = dict(list(modules.items())[learned.trained.dense_layers :])  # dense ones learned nothing
        wanted = names_in(modules) if method.needs_weights else []
        if learned.adapter is not None:
            check_complete(wanted, learned.adapter.names, learned.where)
            matrices, tensors = read_split(learned.adapter.path, lambda key: f".{PROJECTION}." in key, SLAError)
            self._lora = _lora(pipe, name, transformer, matrices, learned.where)
        else:
            base, part = learned.place or ("", "")
            tensors = read_projections(base, modules, part) if wanted else {}
        try:
            if wanted:
                load_projections(transformer, modules, tensors, transformer.config.attention_head_dim)
                self._modules = modules
                if learned.adapter is None:
                    self._stated = Stated(transformer, SLA.name, learned.trained.facts())
        except BaseException:
            self.remove()
            raise

    def remark(self, tokens: int) -> str:
        """What to say of videos of so many tokens; empty for those of the training."""
        if self.trained is None or not self.trained.blocks or tokens in self.trained.blocks:
            return ""
        known = ", ".join(f"{count:,}" for count in self.trained.blocks)
        return f"SLA was trained on videos of {known} tokens, and this one has {tokens:,}"

    def remove(self) -> None:
        """Take it all away. A second call does nothing."""
        detach(self._modules.values(), PROJECTION)
        self._modules = {}
        if self._stated is not None:
            self._stated.remove()
            self._stated = None
        if self._lora is not None:
            self._lora.remove()
            self._lora = None


def _lora(pipe: Any, name: str, transformer: Any, matrices: dict[str, torch.Tensor], where: str) -> NamedLora:
    if not hasattr(pipe, "load_lora_weights"):
        raise SLAError(f"a {type(pipe).__name__} cannot load the LoRA of {where}: give the pipeline.")
    return NamedLora(pipe, name, transformer, matrices, _LORA, where, SLAError)
