"""Whether a preset can be measured, by what it names, before weights are read and hours of work begin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import BadInput
from ..levers.guidance import check_guidance, guidance_adapters, own_adapters, placed
from ..levers.lora_fit import check_fits
from ..levers.loras import check_targets, lora_files
from ..levers.presets import check_scheduler, refusals
from ..levers.sla import check_learned, sla_adapters
from ..machine import check_formats, check_runs, check_second_stage, check_stand_ins
from ..requests.filled import said_of_preset

if TYPE_CHECKING:
    from ...pipelines.presets import Preset
    from ..models.facts import ModelFacts
    from ..requests.settings import Settings


def check_named(
    preset: Preset, settings: Settings, facts: ModelFacts, pipe: Any, device: torch.device, dtype: torch.dtype
) -> None:
    """Check what a preset names: files, a scheduler, a method and a backend. No weights are read.

    Args:
        preset: with all levers that are measured.
        settings: of the videos, checked.
        facts: of the model that it is measured on. pipe: it, where it was given loaded.
        device, dtype: where and in what it runs.

    Raises:
        BadInput: one is not there, is for another model, or cannot be had here.
    """
    from ...pipelines.presets.checks import scheduler_class
    from ...pipelines.presets.preset import OWN

    of_weights, method = placed(facts, pipe), preset.method
    with said_of_preset(), refusals():
        loras = lora_files(list(preset.loras))
        check_fits(loras, facts)
        check_targets(loras, of_weights)
        own = preset.guidance_free == (OWN,)
        adapters = own_adapters(of_weights) if own else guidance_adapters(preset.guidance_free)
        check_guidance(adapters, of_weights, settings)
        check_scheduler(preset, adapters)
        if preset.scheduler is not None:
            scheduler_class(preset.scheduler)
        if method is None:
            return
        check_runs(preset.backend, device, sparse=True)
        check_formats(preset.backend, device, preset.precision, dtype)
        check_stand_ins(preset.backend, device, method)
        check_second_stage(preset.backend, device, method)
        learned = sla_adapters(preset.sla, [method.name])
        check_learned(method, learned, of_weights)
        try:
            method.check(settings.layout(facts))
        except ValueError as error:
            raise BadInput("preset", f"cannot be used: {str(error).rstrip('.')}") from error
