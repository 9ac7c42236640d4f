"""Whether LoRAs are for a model, told from their files before its weights are read; and how they were trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipelines.files.adapter_header import facts_of
from ...pipelines.loras.files import LoraFile, lora_file
from ..errors import BadInput, mention

if TYPE_CHECKING:
    from ...attention.methods.base import Method
    from ..models.facts import ModelFacts


def check_fits(loras: Sequence[LoraFile], facts: ModelFacts) -> None:
    """Raise BadInput for a LoRA of another family, or of another size of model.

    Args:
        loras: of the request.
        facts: of the model.
    """
    if not loras:
        return
    from ...pipelines.loras.layers import LoraLayers

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


def trained_elsewhere(loras: Sequence[LoraFile], facts: ModelFacts) -> list[str]:
    """A sentence for each LoRA that may have been trained on other weights of the family than those of the model.

    Files are compared, so the same weights in another precision are not recognised; of a model of the hub, whose files
    may not be here yet, names; and of a pipeline that came from no place, nothing. One for longer videos is refused
    (`length.check_bases`), so nothing is said of it here.

    Args:
        loras: of the request; those that do not say what they were trained on are passed over.
        facts: of the model.
    """
    from ...pipelines.files.weight_files import transformer_files
    from ...pipelines.length.trained import RECIPE as LENGTH

    said: list[str] = []
    if facts.location == facts.pipeline_class:  # as `inspect_pipeline` names one that was put together from parts
        return said
    for lora in loras:
        stated = facts_of(lora.path)
        base, base_hash, part = stated.get("base"), stated.get("base_hash"), str(stated.get("part", "transformer"))
        if not base_hash or base == facts.location or stated.get("recipe") == LENGTH:
            continue
        trained = f"{lora.path.name} was trained on {base} ({part}), and "
        if not Path(facts.location).is_dir():
            said.append(
                f"{trained}whether {facts.name} has the same weights is not known: where it has others, what it "
                "learned may not come out whole."
            )
        elif transformer_files(facts.location, part) != base_hash:
            said.append(
                f"{trained}{facts.name} has other files: other weights, or the same in another precision or in other "
                "parts. Where it has others, what it learned may not come out whole."
            )
    return said


def trained_otherwise(
    loras: Sequence[LoraFile], methods: Mapping[str, Method | None], density: float | None
) -> list[str]:
    """How the attention that LoRAs were trained with differs from that of the runs, a sentence for each that does.

    One that was trained with dense attention is as the model, which sparse attention comes near to. One for longer
    videos is refused with another attention (`length.check_trained`), so nothing is said of it here.

    Args:
        loras: of the request; those that do not say how they were trained are passed over.
        methods: of the runs, by label; None is dense.
        density: that is asked for, None for the methods' own.
    """
    from ...pipelines.length.trained import RECIPE as LENGTH

    said = []
    for lora in loras:
        facts = facts_of(lora.path)
        attention = None if facts.get("recipe") == LENGTH else facts.get("attention")
        wanted = attention.get("method") if isinstance(attention, dict) else None
        if not isinstance(wanted, str) or wanted == "dense":
            continue
        share = attention.get("density")
        other = [label for label, method in methods.items() if method is None or method.name != wanted]
        trained = f"{lora.path.name} was trained with {wanted} attention"
        if isinstance(share, int | float):
            trained += f" at a density of {share:g}"
        if other:
            said.append(f"{trained}, and {', '.join(other)} is another: what it learned may not come out whole.")
        elif isinstance(share, int | float) and share != density:
            asked = "leaves it to the method" if density is None else f"has {density:g}"
            said.append(f"{trained}, and this run {asked}: give {mention('density')} {share:g} for what it learned.")
        for method in methods.values():
            if method is not None and method.name == wanted and (differing := _differing(attention, method)):
                said.append(f"{trained} with other settings than those of this run: {'; '.join(differing)}.")
    return said


def _differing(trained: Mapping[str, Any], method: Method) -> list[str]:
    """ "what A then, B now" of what a training chooses beside the density: dense steps and layers, size of blocks.

    What else a method has follows from the density, and with it from the size of the video.

    Args:
        trained: what the header of the LoRA says of attention; an older one says none of this.
        method: of the run.
    """
    schedule, settings = trained.get("schedule") or {}, trained.get("settings") or {}
    pairs = [
        (mention("dense_steps"), schedule.get("first_steps"), method.schedule.first_steps),
        (mention("dense_layers"), schedule.get("first_layers"), method.schedule.first_layers),
    ]
    found = [f"{name} {then:g} then, {now:g} now" for name, then, now in pairs if then is not None and then != now]
    sizes = settings.get("block_size"), getattr(method, "block_size", None)
    if "block_size" in settings and sizes[0] != sizes[1]:
        then, now = ("the method's own" if size is None else size for size in sizes)
        found.append(f"{method.name}.block_size {then} then, {now} now")
    return found
