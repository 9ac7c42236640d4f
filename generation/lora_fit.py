"""Whether LoRAs are for a model, told from their files before its weights are read; and how they were trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BadInput
from .lora_files import LoraFile, facts_of, lora_file

if TYPE_CHECKING:
    import torch

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
    import diffusers

    loader = getattr(diffusers, facts.pipeline_class, None)
    name = facts.transformer.get("_class_name")
    if not hasattr(loader, "lora_state_dict") or not isinstance(name, str) or not hasattr(diffusers, name):
        return  # whether it fits shows when it is loaded
    skeleton = _skeleton(getattr(diffusers, name), facts.transformer)
    for lora in loras:
        if (file := lora_file(lora.path)) is None:
            continue  # several files, or none in safetensors
        stated = facts_of(lora.path).get("transformer")
        if isinstance(stated, str) and stated != name:
            raise _refused(f"{lora.path.name} was trained for a {stated}, and {facts.name} has a {name}")
        problem = _misfit(_translated(loader, file), skeleton)
        if problem:
            raise _refused(f"{lora.path.name} {problem.format(name=name, model=facts.name)}")


def _refused(problem: str) -> BadInput:
    return BadInput("lora", f"cannot be used: {problem}")


def _skeleton(cls: Any, config: Mapping[str, Any]) -> dict[str, torch.nn.Module]:
    """The modules of a transformer without weights, by name."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        return dict(cls.from_config(dict(config)).named_modules())


def _translated(loader: Any, file: Path) -> Mapping[str, torch.Tensor] | None:
    """The matrices of a file by diffusers' names; None where its loader for the model cannot translate them."""
    try:
        made = loader.lora_state_dict(str(file.parent), weight_name=file.name)
    except (OSError, ValueError, RuntimeError, LookupError):
        return None
    return made[0] if isinstance(made, tuple) else made


def _misfit(matrices: Mapping[str, torch.Tensor] | None, modules: Mapping[str, torch.nn.Module]) -> str:
    """What is wrong with a LoRA of these matrices for a transformer of these modules; "" for nothing."""
    found = 0
    for key, value in (matrices or {}).items():
        name = key.removeprefix("transformer.")
        layer, first, _ = name.partition(".lora_A.")
        while layer not in modules and "." in layer:  # matrices of other kinds than a LoRA's are named otherwise
            layer = layer.rpartition(".")[0]
        module = modules.get(layer)
        if module is None or next(module.children(), None) is not None:
            continue
        found += 1
        width = getattr(module, "in_features", None)
        if first and width is not None and value.shape[1] != width:
            return f"is for layers of width {value.shape[1]} where the {{name}} of {{model}} has {width} ({layer})"
    return "" if found else "has nothing for the {name} of {model}: it is for another family"


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
