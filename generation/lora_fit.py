"""Whether LoRAs are for a model, told from their files before its weights are read; and how they were trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .errors import BadInput
from .lora_files import LoraFile, facts_of, lora_file

if TYPE_CHECKING:
    from ..attention.methods.base import Method
    from .model_facts import ModelFacts


def check_fits(loras: Sequence[LoraFile], facts: ModelFacts) -> None:
    """Raise BadInput for a LoRA of another family, or of another size of model.

    Args:
        loras: of the request.
        facts: of the model.
    """
    if not loras:
        return
    from ..pipelines.lora_layers import LoraLayers

    layers = LoraLayers(facts.pipeline_class, facts.transformer)
    for lora in loras:
        stated, file = facts_of(lora.path).get("transformer"), lora_file(lora.path)
        problem = ""
        if layers.name is not None and stated not in (None, layers.name):
            problem = f"was trained for a {stated}, and {facts.name} has a {layers.name}"
        elif file is not None and layers.known:
            problem = layers.misfit(file)
        if problem:
            raise BadInput("lora", f"cannot be used: {lora.path.name} {problem}")


def trained_otherwise(loras: Sequence[LoraFile], methods: Mapping[str, Method | None]) -> list[str]:
    """How the attention that LoRAs were trained with differs from that of the runs, a sentence for each that does.

    A LoRA whose mask has to be the same (recipe `length`) is refused elsewhere, and not named here.

    Args:
        loras: of the request; those that do not say how they were trained are passed over.
        methods: of the runs, by label; None is dense.
    """
    said = []
    for lora in loras:
        attention = facts_of(lora.path).get("attention")
        if not isinstance(attention, dict) or not isinstance(attention.get("method"), str):
            continue
        wanted = attention["method"]
        other = [label for label, method in methods.items() if (method.name if method else "dense") != wanted]
        if other:
            density = attention.get("density")
            share = f" at a density of {density:g}" if isinstance(density, int | float) else ""
            said.append(
                f"{lora.path.name} was trained with {wanted} attention{share}, and {', '.join(other)} is another: what "
                "it learned may not come out whole."
            )
    return said
