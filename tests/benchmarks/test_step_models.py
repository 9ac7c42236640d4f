"""The transformers that `benchmarks/step.py` measures."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from no_torchvision import where_it_is_missing

from vidaccel.pipelines import find_transformers

NAME = "step_models"
spec = importlib.util.spec_from_file_location(NAME, Path(__file__).parents[2] / "benchmarks" / f"{NAME}.py")
sys.modules[NAME] = module = importlib.util.module_from_spec(spec)  # for its dataclass
spec.loader.exec_module(module)
del sys.modules[NAME]  # no second name for a file of the package's folder
where_it_is_missing()
LOOK_AT_DATA = ("hunyuan-video-1.5", "mochi")  # in their forward pass, which the meta device cannot


@pytest.mark.parametrize("name", module.MODELS)
def test_models_of_a_step_take_what_they_are_given(name):
    """Shapes are checked by the real class: at full width and size on the meta device, or smaller on the CPU."""
    model = module.MODELS[name]
    settings = model.with_layers(len(model.layers)) | ({"num_attention_heads": 2} if name in LOOK_AT_DATA else {})
    video = (2 * model.factors[0] + 1, 64, 96) if name in LOOK_AT_DATA else model.video
    with torch.device("cpu" if name in LOOK_AT_DATA else "meta") as device, torch.no_grad():
        transformer = getattr(diffusers, model.transformer)(**settings)
        latent = model.latent(*video)
        given = model.inputs(transformer.config, lambda *sizes: torch.randn(sizes), *latent)
        masks = {key: torch.ones_like(value, device="cpu") for key, value in given.items() if "mask" in key}
        transformer(timestep=torch.tensor([900.0]), **given | {key: mask.to(device) for key, mask in masks.items()})
    ((_, family),) = find_transformers(transformer).values()
    (layout,) = family.layout(transformer, given | masks)
    assert layout.frames == latent[0] and layout.tokens == layout.video_tokens + layout.text_tokens
    assert layout.text_tokens == sum(mask.shape[1] for key, mask in masks.items() if "encoder" in key) or (
        name == "cogvideox-5b" and layout.text_before == 226
    )
