"""Cosmos 1, Predict2, Predict2.5 and 3. They come with a guardrail, a package of its own.

Cosmos 3's queries are those of the video alone; its keys have the prompt before them, whose length is not known before.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...pipelines import head_counts
from .frames import FLOORED
from .row import Config, PipelineRow, downsampling_factors, stated_factors, wan_factors


def _factors(vae: Config) -> tuple[int, int]:
    return stated_factors({"temporal_compression_ratio": 8, **vae})


def _sound(pipe: Any, result: Any) -> tuple[Any, int] | None:
    """Made where the option `enable_sound` asks for it."""
    audio = getattr(result, "sound", None)
    return None if audio is None else (audio, int(pipe.sound_tokenizer.config.sampling_rate))


_GUARDRAIL = {"cosmos_guardrail": "cosmos_guardrail"}
_COSMOS = PipelineRow(
    "CosmosTextToWorldPipeline",
    FLOORED,
    fps=30.0,
    factors=_factors,
    no_negative_prompt=None,
    rate="fps",
    packages=_GUARDRAIL | {"torchvision": "torchvision"},
)
_WORLD: dict[str, Any] = {
    "takes": {"image": "image", "video": "video"},
    "needs": (("image", "video"),),
    "continues": "inside",
}
_PREDICT_2 = replace(
    _COSMOS, pipeline="Cosmos2VideoToWorldPipeline", fps=16.0, factors=downsampling_factors, follows=False, **_WORLD
)

ROWS = (
    _COSMOS,
    replace(_COSMOS, pipeline="CosmosVideoToWorldPipeline", **_WORLD),
    _PREDICT_2,
    replace(_PREDICT_2, pipeline="Cosmos2_5_PredictBasePipeline", rate="", needs=(), continues="before", least_video=5),
    PipelineRow(
        "Cosmos3OmniPipeline",
        FLOORED,
        fps=24.0,
        factors=wan_factors,
        defaults=lambda transformer, size_factor: {"frames": 189, "height": 720, "width": 1280},
        takes={"image": "image", "video": "video"},
        continues="inside",
        no_negative_prompt=None,
        rate="fps",
        result="video",
        single=True,
        audio=_sound,
        follows=False,
        heads=head_counts.cosmos_3,
        packages=_GUARDRAIL,
        by_config=lambda row, transformer, index: (
            row if index.get("enable_safety_checker", True) else replace(row, packages={})
        ),
    ),
)
