"""LoRAs for a diffusers pipeline: files of several tools, each into the transformer that it is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

TRANSFORMERS = ("transformer", "transformer_2")
TARGETS = ("all", *TRANSFORMERS)
FORMATS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Of files that can be LoRAs; all but the first are torch's."""


class LoraError(ValueError):
    """A LoRA that a pipeline cannot take."""


class WrongTransformer(LoraError):
    """A LoRA for a transformer that a pipeline does not have."""


@dataclass(frozen=True)
class LoraFile:
    """One LoRA.

    Args:
        path: a file, as diffusers, ComfyUI or musubi-tuner write them, a folder with a `pytorch_lora_weights` file, or
            that of a run, see `run_folder.adapter_path`.
        weight: its update is multiplied by this.
        target: one of `TARGETS`; Wan 2.2 has two transformers, the first for the noisy part of the steps. None leaves
            it to the file, see `target_of`.
    """

    path: Path
    weight: float = 1.0
    target: str | None = None


def trained_for(path: Path) -> str | None:
    """The transformer that a file says that it was trained for; None where it says nothing.

    Args:
        path: of the file, or see `LoraFile`.
    """
    from ..files.adapter_header import facts_of

    facts = facts_of(path)
    stage = facts.get("levels") != [0.0, 1.0] and facts.get("part")
    return stage if stage in TRANSFORMERS else None


def target_of(lora: LoraFile) -> str:
    """Where a LoRA goes, of `TARGETS`: where it is said to, otherwise where its file says, otherwise "all"."""
    return lora.target or trained_for(lora.path) or "all"


def check_readable(path: Path) -> None:
    """Raise LoraError for a folder without weights, a safetensors file whose header cannot be read, and other kinds."""
    from safetensors import SafetensorError, safe_open

    file = _chosen(path)
    if file.is_dir():
        if not any(each.suffix in (".safetensors", ".bin") for each in file.iterdir()):
            raise LoraError(f"the folder {path} has no weights: give the file, or the folder that it is in.")
    elif file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise LoraError(
                f"{file} is damaged, or no safetensors file ({error}): copy or download it again."
            ) from error
    elif file.suffix not in FORMATS:
        rest = f"{', '.join(FORMATS[1:-1])} or {FORMATS[-1]}"
        fix = f"A {FORMATS[0]} file with another ending, such as .sft, must be renamed to that."
        raise LoraError(f"{file} is none by its name: a LoRA is a {FORMATS[0]} file, or one of torch's ({rest}). {fix}")


def lora_file(path: Path) -> Path | None:
    """The one safetensors file of a LoRA; None where a folder has several and none of the usual name."""
    from ..files.run_folder import adapter_path

    file = adapter_path(path)
    if file.is_dir():
        every = [each for each in file.iterdir() if each.suffix == ".safetensors"]
        return every[0] if len(every) == 1 else None
    return file if file.suffix == ".safetensors" else None


def of_run(lora: LoraFile) -> LoraFile:
    """A LoRA whose path is the folder of its file, where it was that of a run or of a checkpoint.

    Raises:
        LoraError: the run has none, or several, see `run_folder.adapter_path`.
    """
    file = _chosen(lora.path)
    return lora if file in (lora.path, lora.path / file.name) else replace(lora, path=file.parent)


def _chosen(path: Path) -> Path:
    from ..files.run_folder import NoAdapter, chosen_adapter

    try:
        return chosen_adapter(path)
    except NoAdapter as error:
        raise LoraError(str(error)) from error


def check_part(lora: LoraFile, parts: Sequence[str]) -> str:
    """`target_of` a LoRA; WrongTransformer where that is not among the parts of a pipeline."""
    target = target_of(lora)
    if target != "all" and target not in parts:
        raise WrongTransformer(f"{lora.path.name} is for {target}, and this pipeline has {' and '.join(parts)} alone.")
    return target


def attach_loras(pipe: DiffusionPipeline, loras: Sequence[LoraFile], name_as: str = "lora") -> list[str]:
    """Load LoRAs into a pipeline, beside those that it has already.

    Args:
        pipe: the pipeline. loras: to load.
        name_as: begins their names, under which the pipeline knows them.

    Returns:
        What of them has no place in the pipeline, a sentence for each that has such.

    Raises:
        LoraError: the pipeline takes none, lacks the transformer that one is for, or a file does not fit it.
    """
    if loras and not hasattr(pipe, "load_lora_weights"):
        raise LoraError(f"a {type(pipe).__name__} takes none. Leave them out.")
    parts = {name: part for name in TRANSFORMERS if (part := getattr(pipe, name, None)) is not None}
    weights: dict[str, dict[str, float]] = {name: dict.fromkeys(_active(part), 1.0) for name, part in parts.items()}
    notes = []
    for number, given in enumerate(loras):
        lora = of_run(given)
        target = check_part(lora, list(parts))
        for name, part in parts.items():
            if target in ("all", name):
                adapter = f"{name_as}_{number}"
                notes += _load(pipe, lora, adapter, name, part)
                weights[name][adapter] = lora.weight
    for name, part in parts.items():
        if loras and weights[name]:
            part.set_adapters(list(weights[name]), list(weights[name].values()))
    return notes


def _load(pipe: DiffusionPipeline, lora: LoraFile, adapter: str, name: str, part: torch.nn.Module) -> list[str]:
    """Load one into one transformer; returns and raises as `attach_loras`."""
    from ..acceleration.families import unwrap
    from ..errors import few_of
    from .contents import DORA, biases_some, broken, layers_of, missing_layers, other_kind, translated

    file = {"weight_name": lora.path.name} if lora.path.is_file() else {}
    folder = str(lora.path.parent if file else lora.path)
    options: dict[str, Any] = {"load_into_transformer_2": True} if name == "transformer_2" else {}
    matrices, transformer = translated(pipe, lora.path)[0], unwrap(part)
    if why := broken(matrices):
        raise LoraError(f"{lora.path.name} {why}")
    modules = layers_of(transformer)
    if biases_some(matrices):  # else those that it lacks would have no numbers, where they are 0
        options["low_cpu_mem_usage"] = False
    try:
        pipe.load_lora_weights(folder, adapter_name=adapter, **file, **options)
    except (OSError, ValueError, RuntimeError, LookupError) as error:
        raise LoraError(f"{lora.path.name} {_why_not(pipe, lora, matrices, modules, transformer, error)}") from error
    # diffusers only logs it when nothing in a file is of this model.
    if adapter not in getattr(part, "peft_config", {}):
        raise LoraError(f"nothing in {lora.path.name} is for the {type(transformer).__name__} of this pipeline.")
    notes = []
    if missing := missing_layers(matrices, modules):
        what = f"layers that the {name} does not have ({few_of(missing)})"
        notes.append(f"{lora.path.name} is not whole here: it is also for {what}")
    if other_kind(lora_file(lora.path)) == DORA:
        notes.append(f"{lora.path.name} is not whole here: it is of DoRA, whose scales diffusers leaves out")
    return notes


def _why_not(
    pipe: DiffusionPipeline,
    lora: LoraFile,
    matrices: Mapping[str, torch.Tensor],
    modules: Mapping[str, torch.nn.Module],
    transformer: torch.nn.Module,
    error: Exception,
) -> str:
    """Why diffusers does not load a LoRA, in words behind its name; what it says itself, where that is all."""
    from ..errors import first_line
    from .contents import misfit, unreadable

    if matrices and (why := misfit(matrices, modules, type(transformer).__name__)):
        return why
    return unreadable(error, lora_file(lora.path), type(pipe).__name__) or f"cannot be loaded: {first_line(error)}"


def _active(part: Any) -> list[str]:
    """The adapters that a transformer was loaded with, such as that of adapter-only weights."""
    return part.active_adapters() if getattr(part, "peft_config", None) else []
