"""The nodes for presets: load one, and put it to work in a pipeline of diffusers or in a native MODEL."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from .native.forecast import cache_steps, forecast_log
from .native.geometry import diffusion_model_of
from .native.guidance import guide
from .native.guidance_cache import cache_guidance, guidance_log
from .native.models import find_geometry
from .native.patch import sparsify
from .pipeline.pipelines import require_packages
from .pipeline_nodes import CATEGORY, Pipeline
from .presets import (
    FOLDER,
    NativePart,
    chosen_preset,
    find_presets,
    native_part,
    native_settings,
    state_of_preset,
    with_preset,
)
from .report.cache_log import CacheLog, CachesReport
from .report.wording import PRECISIONS, InputError
from .report_node import Report
from .schema import accepted
from .sparse_nodes import measure_error_input, min_tokens_input
from .watched import READ, Fingerprint, fingerprint

if TYPE_CHECKING:
    from ..pipelines.presets import Preset as PresetOf
    from .pipeline.pipelines import VideoPipeline

logger = logging.getLogger(__name__)

Preset = io.Custom("VIDACCEL_PRESET")


def _roots() -> list[str]:
    import folder_paths

    # Beside what extra_model_paths.yaml has for this name, which ComfyUI reads before it loads nodes.
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    return folder_paths.get_folder_paths(FOLDER)


class VidaccelLoadPreset(io.ComfyNode):
    """A preset from the package, a folder or a path."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VidaccelLoadPreset",
            display_name="Load Preset",
            category="video acceleration",
            description="A preset: all that makes one model faster, under one description: a method, guidance in one "
            "pass, a cache, a guidance cache, LoRAs, a scheduler, a tiny decoder. Those of the package, and .yaml and "
            ".json files in models/vidaccel_presets.",
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=list(find_presets(_roots())),
                    tooltip="One of the package, or a file below models/vidaccel_presets.",
                ),
                io.String.Input(
                    "path",
                    default="",
                    tooltip="Path of a .yaml or .json file; it is taken instead of the one above.",
                ),
            ],
            outputs=[Preset.Output(display_name="preset", tooltip="For Apply Preset.")],
            **accepted(io.Schema, search_aliases=["vidaccel", "speed up video", "tune"]),
        )

    @classmethod
    def fingerprint_inputs(cls, preset: str | None, path: str | None) -> Fingerprint:
        """Read a file anew once it was changed, by hand or by Tune, or one that it names was."""
        return fingerprint(state_of_preset(preset, path, _roots()), preset, path)

    @classmethod
    def execute(cls, preset: str, path: str) -> io.NodeOutput:
        roots = _roots()
        chosen = chosen_preset(preset, path, roots)
        READ.remember(path.strip() or preset, lambda: state_of_preset(preset, path, roots))
        return io.NodeOutput(chosen)


class VidaccelApplyPreset(io.ComfyNode):
    """A preset for a pipeline."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VidaccelApplyPreset",
            display_name="Apply Preset",
            category=CATEGORY,
            description="Puts a preset to work in a pipeline: its method, caches, LoRAs, scheduler, tiny decoder and "
            "guidance in one pass. Its steps and guidance are taken where Generate Video has 0. The pipeline that "
            "comes in stays as it is.",
            inputs=[
                Pipeline.Input("pipeline", tooltip="From Load Video Pipeline. It is not changed."),
                Preset.Input("preset", tooltip="From Load Preset."),
            ],
            outputs=[Pipeline.Output(display_name="pipeline", tooltip="For Generate Video.")],
            **accepted(io.Schema, search_aliases=["vidaccel", "speed up video", "cache"]),
        )

    @classmethod
    def execute(cls, pipeline: VideoPipeline, preset: PresetOf) -> io.NodeOutput:
        return io.NodeOutput(with_preset(pipeline, preset))


class VidaccelApplyPresetNative(io.ComfyNode):
    """The method and the guidance of a preset for a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VidaccelApplyPresetNative",
            display_name="Apply Preset (native)",
            category="video acceleration",
            description="Puts what it can of a preset into a native MODEL: the method with what stays dense, guidance "
            "in one pass, the forecast cache and the guidance cache. For the rest ComfyUI has nodes of its own, which "
            "the error names.",
            inputs=[
                io.Model.Input("model", tooltip="The model that the preset is for. It is not changed."),
                Preset.Input("preset", tooltip="From Load Preset."),
                io.Boolean.Input(
                    "skip_others",
                    default=False,
                    tooltip="Go on without what is for other nodes to set: other caches, LoRAs, a scheduler, steps, "
                    "guidance in two passes, layers in 8 bits, compiled blocks, a tiny decoder, SLA, VSA, the adapter "
                    "of a folder of diffusers. The log and the report say which, with the values to set. Off, that is "
                    "an error.",
                ),
                # At the end and optional, and so that what was saved without them runs as it did: a preset that is
                # chosen for a video is sparse, however short that is.
                min_tokens_input(default=0, optional=True),
                measure_error_input(),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For a sampler."),
                Report.Output(display_name="report", tooltip="For the node Sparse Attention Report."),
            ],
            **accepted(io.Schema, search_aliases=["vidaccel", "speed up video", "sparse attention"]),
        )

    @classmethod
    def execute(cls, model: Any, preset: PresetOf, skip_others: bool, **common: int) -> io.NodeOutput:
        return io.NodeOutput(*apply_native(model, preset, skip_others, **common))


def apply_native(
    model: Any, preset: PresetOf, skip_others: bool = False, min_tokens: int = 0, measure_error: int = 0
) -> tuple[Any, Any]:
    """A clone of a MODEL with what it can have of a preset, and its report; the MODEL stays as it is.

    Args:
        model: ComfyUI's ModelPatcher.
        preset: the preset.
        skip_others: go on without what a MODEL cannot have of it.
        min_tokens, measure_error: of its method, see `sparsify`.

    Raises:
        InputError: the preset is for another model, or has what a MODEL cannot have.
    """
    diffusion_model = diffusion_model_of(model)
    geometry = find_geometry(diffusion_model)
    if geometry is None:
        raise InputError(f"a {type(diffusion_model).__name__} is no model that presets are for.")
    part = native_part(preset, geometry, diffusion_model)
    if part.left and not skip_others:
        raise InputError(
            f"preset {preset.name} has what other nodes set: {'; '.join(part.left)}. Set it there and switch "
            "skip_others on."
        )
    for each in part.left:
        logger.warning("preset %s: not taken from it: %s", preset.name, each)
    made = model
    if part.adapter is not None:
        require_packages(f"preset {preset.name} has an adapter for guidance in one pass, which needs")
        made = guide(made, part.adapter, part.guidance)
    logs: tuple[CacheLog, ...] = ()
    if part.forecast is not None:
        logs = (forecast_log(),)
        made = cache_steps(made, part.forecast, *logs)
    elif part.guidance_cache is not None:
        logs = (guidance_log(),)
        made = cache_guidance(made, part.guidance_cache, *logs)
    method = part.method
    if method is None:
        left = f" Not taken from it: {'; '.join(part.left)}." if part.left else ""
        return made, CachesReport(f"{_without_method(preset.name, part)}{left}", logs)
    made, session = sparsify(
        made,
        lambda layout: method,
        name=method.name,
        settings=native_settings(preset, part),
        stand_ins=method.name if method.stands_in else "",
        dense_start_percent=part.dense_start_percent,
        dense_end_percent=part.dense_end_percent,
        dense_layers=part.dense_layers,
        dense_steps=part.dense_steps,
        min_tokens=min_tokens,
        by_length=method.name,
        measure_error=measure_error,
        backend=preset.backend,
        precision=preset.precision or PRECISIONS[0],
    )
    session.beside = logs
    return made, session


def _without_method(name: str, part: NativePart) -> str:
    """What a MODEL got of a preset without a method, for the report."""
    has = {
        "Guidance takes one pass.": part.adapter is not None,
        "Steps are left out where they can be told ahead.": part.forecast is not None,
        "Passes of the negative prompt are left out.": part.guidance_cache is not None,
    }
    told = [text for text, there in has.items() if there]
    return (
        f"{' '.join(told)} The preset {name} has no method that a MODEL can take: attention is as other nodes leave it."
    )


NODES: list[type[io.ComfyNode]] = [VidaccelLoadPreset, VidaccelApplyPreset, VidaccelApplyPresetNative]
