"""Longer videos: a LoRA of the recipe `length` brings its attention with it, and RIFLEx as a switch."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...pipelines.nearest_name import nearest
from ..errors import BadInput, mention
from ..requests.values import text

if TYPE_CHECKING:
    from ...attention.layout import VideoLayout
    from ...attention.methods.base import Method
    from ...pipelines.length.settings import Riflex
    from ...pipelines.length.trained import TrainedLength
    from ...pipelines.loras.files import LoraFile
    from ..models.facts import ModelFacts

ROPES = ("plain", "riflex")

_HUNYUAN = ("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline")


def built_in_lora(model: object, frames: int | None, asked: bool) -> tuple[tuple[LoraFile, ...], str]:
    """The LoRA of the built-in model for a video longer than it was trained on, the first that was trained on as long
    ones, and what to say of it.

    Args:
        model: as it was given.
        frames: of the request.
        asked: whether LoRAs, attention or a rotary embedding are asked for, to which it would add.
    """
    from ... import demo
    from ...pipelines.loras.files import LoraFile
    from ..models.inspected import inspect_model

    if model != demo.WAN or asked or not isinstance(frames, int):
        return (), ""
    facts = inspect_model(demo.WAN)
    if frames <= facts.call_defaults()["frames"]:
        return (), ""
    for lora in map(LoraFile, demo.length_loras()):
        (trained,) = trained_lengths([lora])
        if frames <= (trained.frames - 1) * facts.frame_factor + 1:
            return (lora,), (
                f"{frames} frames are more than the built-in model was trained on: its LoRA for longer videos is used "
                f"({trained}); {mention('method')} dense is without it."
            )
    return (), ""


def trained_lengths(loras: Sequence[LoraFile]) -> tuple[TrainedLength, ...]:
    """What those among the LoRAs were trained with that are for longer videos.

    Raises:
        BadInput: a header that cannot be used, or two that were trained with different attention.
    """
    from ...pipelines.files.adapter_header import facts_of
    from ...pipelines.files.run_folder import adapter_path
    from ...pipelines.length.trained import LengthError, trained_length

    found = []
    for lora in loras:
        path = adapter_path(lora.path)
        try:
            trained = trained_length(facts_of(path), path.name)
            if trained is not None:
                found.append(trained)
                trained.check_method(found[0].method)
        except LengthError as error:
            raise _refused("lora", error) from error
    if any(trained.riflex != found[0].riflex for trained in found):
        raise BadInput("lora", "one of these was trained with RIFLEx and another without, so they cannot be together")
    return tuple(found)


def check_bases(loras: Sequence[LoraFile], facts: ModelFacts) -> None:
    """Raise BadInput for a LoRA for longer videos that was trained on another model."""
    from ...pipelines.files.adapter_header import facts_of
    from ...pipelines.files.run_folder import adapter_path
    from ...pipelines.files.weight_files import transformer_files
    from ...pipelines.length.trained import RECIPE

    for lora in loras:
        said = facts_of(lora.path)
        if said.get("recipe") != RECIPE:
            continue
        part = str(said.get("part", "transformer"))
        if transformer_files(facts.location, part) != said.get("base_hash"):
            name = adapter_path(lora.path).name
            problem = f"{name} was trained on {said.get('base')} ({part}), and this model is another"
            raise BadInput("lora", problem, "Give one that was trained on this model.")


def check_trained(trained: Sequence[TrainedLength], methods: Mapping[str, Method | None], layout: VideoLayout) -> None:
    """Raise BadInput for another attention, or a longer video, than those of the training."""
    from ...pipelines.length.trained import LengthError

    for one in trained:
        try:
            one.check_frames(layout.frames)
        except LengthError as error:
            raise _refused("frames", error) from error
        for method in methods.values():
            try:
                one.check_method(method)
            except LengthError as error:
                raise _refused("method", error) from error


def chosen_riflex(rope: str, trained: Sequence[TrainedLength], facts: ModelFacts) -> Riflex | None:
    """RIFLEx as it is asked for, or as the LoRAs were trained with it.

    Raises:
        BadInput: another name, a model that has no place for it, or a LoRA that was trained without.
    """
    if text("rope", rope) not in ROPES:
        raise BadInput("rope", f"there is none of that name{nearest(rope, ROPES)}", value=rope)
    if trained:
        if rope == "riflex" and trained[0].riflex is None:
            raise BadInput("rope", f"{trained[0].name} was trained with the plain one", "Leave it out.", value=rope)
        return trained[0].riflex
    if rope == "plain":
        return None
    from ...pipelines.length.settings import Riflex

    wan = facts.pipeline_class.startswith("Wan") and facts.pad_frames is None
    if not wan and facts.pipeline_class not in _HUNYUAN:
        problem = f"it is for the rotary embedding of Wan and HunyuanVideo, and this is a {facts.pipeline_class}"
        raise BadInput("rope", problem, "Leave it out.", value=rope)
    frames = int(facts.call_defaults()["frames"])
    return Riflex((frames - 1) // facts.frame_factor + 1)


def roped(pipe: Any, riflex: Riflex | None) -> contextlib.AbstractContextManager:
    """A loaded pipeline with RIFLEx; as it is without.

    Raises:
        BadInput: a transformer that has no place for it.
    """
    if riflex is None:
        return contextlib.nullcontext()
    from ...pipelines.length.rotary import riflex as install

    try:
        return install(pipe, riflex)
    except (TypeError, ValueError) as error:
        raise BadInput("rope", str(error).rstrip(".")) from error


def _refused(field: str, error: ValueError) -> BadInput:
    return BadInput(field, f"cannot be: {str(error).rstrip('.')}")
